"""Enhance: interpolation by known filters, passes in float that do not depend on each other, sizes and records."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from datasets import load_dataset
from PIL import Image
from timm.data import create_dataset

from boomgen import images, manifest
from boomgen.boomerang import boomerang, cascade
from boomgen.cli import main
from boomgen.errors import RowError, UsageError
from boomgen.job import Job, Launch
from boomgen.noise import Stream, normal
from boomgen.plan import describe
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.shard import PART, TAR, sha256_file
from boomgen.training import BoomerangMix
from boomgen.verify import remake, verify
from boomgen.worker import Worker

from .chains import FAMILIES, KEYS, Noise, curved
from .conftest import Complaint, PlanTiny
from .finished import finish, grey, samples
from .test_boomerang import N, V, gaussian, rho

RNG = np.random.default_rng(3)
LOW = RNG.integers(80, 176, (5, 7, 3), np.uint8)  # no filter overshoots: Pillow clips after each of the two axes
ENHANCE = {"mode": "enhance", "scale": 2, "degrade": "area", "limit": 20, "shard_size": 8}
DOWN = {"area": "BOX", "linear": "BILINEAR", "cubic": "BICUBIC", "lanczos": "LANCZOS"}


def rows(run: RunDir) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest.read(run.manifest).to_pylist()
    return found


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)))


# Filters and sizes -------------------------------------------------------------------------------------------------


def by_lanczos(x: np.ndarray, size: int) -> np.ndarray:
    """Along the first axis: three lobes, centres at halves, weights that sum to 1 at the edge too."""
    at = (np.arange(size)[:, None] + 0.5) * len(x) / size - (np.arange(len(x)) + 0.5)
    weights = np.sinc(at) * np.sinc(at / 3) * (np.abs(at) < 3)
    out: np.ndarray = np.tensordot(weights / weights.sum(1, keepdims=True), x, 1)
    return out


def reference(low: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """Enlarged in float by torch, which knows every filter but lanczos."""
    if name == "lanczos":
        return by_lanczos(by_lanczos(low.astype(float), height).swapaxes(0, 1), width).swapaxes(0, 1)
    # torch's cubic has a = -0.5 only where it antialiases, which changes nothing when it enlarges
    more = {"nearest": {"mode": "nearest-exact"}, "linear": {"mode": "bilinear"}}
    options: dict[str, Any] = more.get(name, {"mode": "bicubic", "antialias": True})
    x = torch.from_numpy(low).permute(2, 0, 1)[None].double()
    out: np.ndarray = torch.nn.functional.interpolate(x, (height, width), **options)[0].permute(1, 2, 0).numpy()
    return out


@pytest.mark.parametrize("name", ["nearest", "linear", "cubic", "lanczos"])
@pytest.mark.parametrize("scale", [1, 2, 2.5, 4])
def test_interpolation_is_the_named_one(name: str, scale: float) -> None:
    square, box = images.enlarge(LOW, 32, "pad", scale, images.FILTERS[name])
    wanted = reference(LOW, round(5 * scale), round(7 * scale), name)
    found = square[box.top : box.top + box.height, box.left : box.left + box.width]
    assert np.abs(found - wanted.clip(0, 255)).max() <= (0 if name == "nearest" else 1.2)  # two axes, each rounded
    assert square.astype(int).sum() == found.astype(int).sum()
    np.testing.assert_array_equal(images.unfit(square, box), found)


@pytest.mark.parametrize("name", DOWN)
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_degraded_by_the_named_filter(name: str, fit: str) -> None:
    source = RNG.integers(0, 256, (24, 40, 3), np.uint8)
    job = Job(mode="enhance", dataset="-", scale=4, interpolation="linear", degrade=name, fit=fit)
    sharp = images.unfit(*images.fit(source, 16, fit))
    height, width = sharp.shape[:2]
    low = Image.fromarray(sharp).resize((round(width / 4), round(height / 4)), Image.Resampling[DOWN[name]])
    if name == "area" and fit == "crop":
        means = sharp.reshape(4, 4, 4, 4, 3).mean((1, 3))
        assert np.abs(np.asarray(low) - means).max() <= 1
    found = images.unfit(*images.fitted(source, 16, job))
    np.testing.assert_array_equal(found, low.resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("shape", "fit", "scale", "model", "out"),
    [
        ((4, 4), "crop", 4, (16, 16), (16, 16)),  # the model's size
        ((4, 6), "crop", 4, (16, 16), (16, 16)),
        ((8, 8), "crop", 4, (16, 16), (32, 32)),  # greater: resized afterwards
        ((4, 4), "crop", 2, (16, 16), (8, 8)),  # smaller: likewise
        ((3, 5), "pad", 2, (6, 10), (6, 10)),  # smaller: kept as it is, black around it
        ((4, 8), "pad", 4, (8, 16), (16, 32)),
        ((1, 99), "pad", 1, (1, 16), (1, 99)),
        ((5, 5), "pad", 1.5, (8, 8), (8, 8)),
    ],
)
def test_an_image_of_n_leaves_with_n_times_scale(
    shape: tuple[int, int], fit: str, scale: float, model: tuple[int, int], out: tuple[int, int]
) -> None:
    square, box = images.enlarge(np.full((*shape, 1), 9, np.uint8), 16, fit, scale, images.FILTERS["linear"])
    assert square.shape == (16, 16, 1)
    assert (box.height, box.width) == model
    assert np.count_nonzero(square) == model[0] * model[1]
    assert images.unfit(square, box).shape == (*out, 1)


def test_an_output_that_would_be_too_large_is_refused() -> None:
    with pytest.raises(RowError, match=r"^too-large: 64000x64000 pixels when enlarged, at most 134217728 are made$"):
        images.enlarge(np.zeros((1000, 1000, 1), np.uint8), 16, "crop", 64, images.FILTERS["linear"])


# Passes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cascade_of_n_has_correlation_rho_to_the_n(family: str) -> None:
    """Each exact pass keeps the distribution of Gaussian data, and the passes' noises are independent."""
    levels = FAMILIES[family](500)
    x0 = np.sqrt(V) * torch.from_numpy(normal([KEYS[0]], Stream.FORWARD, 0, (N,), draw=9))

    def noise_of(number: int) -> Callable[[Stream, int], torch.Tensor]:
        return lambda stream, step: torch.from_numpy(normal([KEYS[1]], stream, step, (N,), number))

    states = cascade(x0, 3, 100, levels, gaussian(levels, V), noise_of)
    for passes, x in enumerate(states, 1):
        assert np.corrcoef(x0[0], x[0])[0, 1] == pytest.approx(rho(levels, 100) ** passes, abs=0.01)
        assert float(x.std() / x0.std()) == pytest.approx(1, abs=0.02)


def test_no_level_leaves_a_cascade_where_it_is() -> None:
    levels = FAMILIES["vp"](10)
    x0 = torch.rand(4, 3, 8, 8)
    assert all(x is x0 for x in cascade(x0, 3, 0, levels, curved(levels), lambda number: Noise(KEYS, (3, 8, 8))))


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DiT of 10 classes on 4x4 latents of 8x8 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 2}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        num_layers=1,
        norm_num_groups=1,
        sample_size=4,
        num_embeds_ada_norm=10,
    )
    folder = tmp_path_factory.mktemp("latent-model")
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_passes_are_boomerangs_in_float(plan_tiny: PlanTiny, latent_model: Path, tmp_path: Path, space: str) -> None:
    """Three passes composed by hand, on the state that each ended in; decoded between them, they give other images."""
    model = {"model": str(latent_model)} if space == "latents" else {}
    worker = Worker(plan_tiny(tmp_path / "run", **ENHANCE, cascade=3, keep_intermediates=True, **model))
    plan, denoiser = worker.plan, worker.denoiser
    loaded = worker.load(worker.batches(0)[0])
    found, finite = worker.sample(loaded)
    assert finite.all()
    assert len(found) == 3
    keys = [item.row.noise_key for item in loaded]
    condition = denoiser.prepare(torch.tensor([item.row.source.label for item in loaded]))
    inputs = torch.from_numpy(np.stack([item.pixels for item in loaded if item.pixels is not None]))

    @torch.inference_mode()
    def once(x: torch.Tensor, number: int) -> torch.Tensor:
        def noise(stream: Stream, step: int) -> torch.Tensor:
            return torch.from_numpy(normal(keys, stream, step, plan.model.state, draw=number))

        return boomerang(x, plan.chain.level, worker.levels, lambda x, k: denoiser.predict_x0(x, k, condition), noise)

    with torch.inference_mode():
        x = rounded = denoiser.encode(inputs)
        for number, image in enumerate(found):
            x, rounded = once(x, number), once(rounded, number)
            assert torch.equal(denoiser.decode(x), image)
            rounded = denoiser.encode(denoiser.decode(rounded))
        assert not torch.equal(denoiser.decode(rounded), found[-1])


@pytest.fixture(scope="module")
def cascaded(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """20 images, three passes each, all kept."""
    out = tmp_path_factory.mktemp("cascaded") / "run"
    return finish(plan_tiny(out, **ENHANCE, cascade=3, keep_intermediates=True))


def test_a_pass_does_not_depend_on_those_that_follow(cascaded: RunDir, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    every = samples(cascaded)
    assert len(every) == 20
    for passes, field in ((1, "pass1.png"), (2, "pass2.png"), (3, "png")):
        shorter = samples(finish(plan_tiny(tmp_path / str(passes), **ENHANCE, cascade=passes)))
        assert {key: members["png"] for key, members in shorter.items()} == {
            key: members[field] for key, members in every.items()
        }
    assert len({members[field] for members in every.values() for field in ("pass1.png", "pass2.png", "png")}) == 60
    assert cascaded.plan.network.calls == 3 * 4


def test_one_pass_of_no_enlargement_is_augment(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Byte for byte: enhance adds nothing to Boomerang but what is around it."""
    plain = finish(plan_tiny(tmp_path / "plain", mode="augment", limit=20))
    same = finish(plan_tiny(tmp_path / "same", mode="enhance", scale=1, limit=20))
    assert samples(same) == samples(plain)


def test_bytes_do_not_depend_on_workers_and_resumes(cascaded: RunDir, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = plan_tiny(tmp_path / "run", **ENHANCE, cascade=3, keep_intermediates=True)
    Worker(run).make_shard(1)
    assert main(["resume", str(run.path), "--device", "cpu", "--workers", "2"]) == 0
    assert len(list(run.logs.iterdir())) == 2
    for number in range(run.plan.shards):
        for name in (TAR, PART):
            assert sha256_file(run.shard(number) / name) == sha256_file(cascaded.shard(number) / name)
    assert not list(verify(RunDir(run.path)))
    assert not list(remake(RunDir(run.path), 5))


# The data set ------------------------------------------------------------------------------------------------------


def test_loaders_see_one_sample_per_image_and_its_passes(cascaded: RunDir, tmp_path: Path) -> None:
    held = samples(cascaded)
    last = {key: pixels(members["png"]).tobytes() for key, members in held.items()}
    loaded = load_dataset(str(cascaded.dataset), split="train", cache_dir=str(tmp_path))
    assert {row["__key__"]: np.asarray(row["png"]).tobytes() for row in loaded} == last
    assert all(np.array_equal(row["pass2.png"], pixels(held[row["__key__"]]["pass2.png"])) for row in loaded)
    tars = sorted(map(str, cascaded.dataset.glob("data/*.tar")))
    stream = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
    assert {sample["__key__"]: grey(sample["png"]).tobytes() for sample in stream} == last
    by_timm = create_dataset("wds/any", root=str(cascaded.dataset), split="train")
    assert sorted(grey(image).tobytes() for image, _ in by_timm) == sorted(last.values())


def test_variants_differ_and_everything_is_recorded(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = finish(plan_tiny(tmp_path / "run", **ENHANCE | {"degrade": None, "limit": 4}, variants=3))
    found = rows(run)
    assert sorted((row["source_row"], row["variant"]) for row in found) == [(s, v) for s in range(4) for v in range(3)]
    assert len({row["pixel_sha256"] for row in found}) == 12
    wanted = {"scale": 2.0, "interpolation": "linear", "degrade": "", "cascade": 1, "width": 16, "height": 16}
    wanted |= {"model_width": 8, "model_height": 8, "source_width": 8, "label": 0, "fit": "crop"}
    assert all(row[name] == value for row in found for name, value in wanted.items())
    about = [json.loads(members["json"]) for members in samples(run).values()]
    assert {(each["source_row"], each["variant"]) for each in about} == {(s, v) for s in range(4) for v in range(3)}
    assert describe(run.plan)["enhanced"] == "enlarged 2 times by linear, 1 Boomerang pass"
    assert {image.size for image, _ in BoomerangMix(run, p=0.5)} == {(16, 16)}  # originals are enlarged too
    card = (run.dataset / "README.md").read_text()
    assert "enhanced with Boomerang" in card
    assert "Enhanced: enlarged 2 times by linear, 1 Boomerang pass." in card


def test_the_command(tmp_path: Path) -> None:
    """The embedded model on embedded images. At t_boom 0 what comes out is the interpolated image."""
    line = "enhance --dataset fashion-sample --limit 8 --scale 2 --degrade --cascade 2 --variants 2 --t-boom 2/20"
    assert main([*line.split(), "--device", "cpu", "--workers", "1", "--out", str(tmp_path / "run")]) == 0
    found = rows(RunDir(tmp_path / "run"))
    said = {"scale": 2.0, "interpolation": "linear", "degrade": "cubic", "cascade": 2, "width": 28, "model_width": 28}
    assert len(found) == 16
    assert all(row["status"] == "ok" and row[name] == value for row in found for name, value in said.items())
    assert all(row["label"] == row["source_label"] for row in found)
    job = Job(mode="enhance", dataset="fashion-sample", limit=8, scale=2, degrade="area", t_boom="0")
    run = finish(prepare(job, Launch(out=str(tmp_path / "plain"), device="cpu")))
    held, index, opened = samples(run), run.index, run.plan.source.open()
    for row in rows(run):
        sharp = Image.fromarray(np.asarray(opened.read(index.take([row["source_row"]])[0])).squeeze())
        low = sharp.resize((14, 14), Image.Resampling.BOX)
        wanted = np.asarray(low.resize((28, 28), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pixels(held[row["key"]]["png"]), wanted)


# Wrong use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["anonymize", "--scale", 2], "--scale with anonymize; only enhance has it"),
        (["anonymize", "--cascade", 2], "--cascade with anonymize; only enhance has it"),
        (["augment", "--interpolation", "cubic"], "--interpolation with augment; only enhance has it"),
        (["augment", "--degrade"], "--degrade with augment; only enhance has it"),
        (["augment", "--keep-intermediates"], "--keep-intermediates with augment; only enhance has it"),
        (["enhance"], "--scale is missing; say how many times greater the outputs are to be, as --scale 4"),
        (["enhance", "--scale", 0.5], "--scale '0.5': input should be greater than or equal to 1"),
        (["enhance", "--scale", "inf"], "--scale 'inf': input should be less than or equal to 64"),
        (["enhance", "--scale", "nan"], "--scale 'nan': input should be less than or equal to 64"),
        (
            ["enhance", "--scale", "x2"],
            "--scale 'x2': input should be a valid number, unable to parse string as a number",
        ),
        (["enhance", "--scale", 2, "--cascade", 0], "--cascade '0': input should be greater than or equal to 1"),
        (
            ["enhance", "--scale", 2, "--keep-intermediates"],
            "--keep-intermediates with --cascade 1; one pass has none, use a greater --cascade",
        ),
        (
            ["enhance", "--scale", 2, "--degrade", "nearest"],
            "argument --degrade: invalid choice: 'nearest' (choose from 'area', 'linear', 'cubic', 'lanczos'); see "
            "boomgen enhance --help",
        ),
        (
            ["enhance", "--scale", 2, "--linkage", "private"],
            "--linkage private with enhance; its noise follows from a public seed, use anonymize",
        ),
        (
            ["enhance", "--scale", 2, "--secret-file", "secret"],
            "--secret-file with enhance; its link is public, use --seed",
        ),
    ],
)
def test_wrong_options_are_one_line(complaint: Complaint, args: list[Any], line: str) -> None:
    assert complaint(args[0], "--dataset", "fashion-sample", *args[1:]) == line


def test_another_scale_is_another_run(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    plan_tiny(tmp_path / "run", **ENHANCE)
    with pytest.raises(UsageError, match=r"was planned with scale 2\.0 \(now 4\.0\), degrade area \(now None\); use"):
        plan_tiny(tmp_path / "run", **ENHANCE | {"scale": 4, "degrade": None})
