"""Every family, from a folder that diffusers saved, through the command line, against diffusers itself."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boomgen.boomerang import boomerang
from boomgen.cli import main
from boomgen.job import Job, Launch
from boomgen.noise import normal
from boomgen.plan import planned_rows
from boomgen.prepare import prepare
from boomgen.run import RunDir
from boomgen.samplers import sampler_of
from boomgen.shard import TAR
from boomgen.worker import Worker

from . import references
from .folders import FOLDERS, SIDE, save
from .references import CLASSES, Case

PLAIN = {"t_boom": "0.4", "steps": 10, "batch_size": 3, "shard_size": 3, "dtype": "float32"}
FLOW = {"eta": 0.0}  # diffusers goes back along the flow; with noise it is proven in closed form elsewhere
FAMILIES: dict[str, tuple[Callable[[Case, Any], Any], float, dict[str, Any]]] = {
    "sd1": (references.stable, 7.5, {}),
    "sd2": (references.stable, 7.5, {}),
    "sd_turbo": (references.stable, 1.0, {"steps": 4, "t_boom": "0.5"}),
    "lcm": (references.lcm, 8.5, {}),
    "sdxl": (references.sdxl, 5.0, {}),
    "dit": (references.dit, 4.0, {}),
    "sd3": (references.sd3, 7.0, FLOW),
    "flux_dev": (references.flux, 3.5, FLOW),
    "flux_schnell": (references.flux, 1.0, FLOW),
    "ddpm": (references.pixels, 1.0, {}),
    "adm": (references.adm, 1.0, {"sampler": "learned"}),
    "ablated_classes": (references.ablated_classes, 1.0, {"sampler": "learned"}),
    "ablated_cosine": (references.ablated_cosine, 1.0, {}),
    "patched": (references.patched, 1.5, {"sampler": "learned", "guidance": 1.5}),
    "ncsnpp": (references.ncsnpp, 1.0, {"sampler": "predictor-corrector", "batch_size": 1}),
    "consistency": (references.consistency, 1.0, {"steps": 40}),
}
IN_CI = {"sd2", "dit", "ddpm"}
"""Made also by a worker of their own, whose imports take longer than all else; the others so in `make slow`."""
TOLD_INDICES = FAMILIES.keys() - {"ncsnpp", "consistency"}  # these are told sigma


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five smooth pictures of two classes."""
    place = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(5):
        file = place / CLASSES[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC).save(file)
    return place


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: save(name, tmp_path_factory.mktemp("family") / name)


def by_command_line(job: dict[str, Any], out: Path) -> RunDir:
    """Made by a worker of its own."""
    options = [text for name, value in job.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["augment", *options, "--device", "cpu", "--workers", "1", "--out", str(out)]) == 0
    return RunDir(out)


def by_two(job: dict[str, Any], out: Path) -> RunDir:
    """Made by two workers in this process, in turns, the last shard first."""
    run = prepare(Job(mode="augment", **job), Launch(device="cpu", out=str(out)))
    workers = Worker(run), Worker(run)
    for shard in reversed(range(run.plan.shards)):
        workers[shard % 2].make_shard(shard)
    return run


def outputs(run: RunDir) -> np.ndarray[Any, Any]:
    """The written images (N, H, W, 3), in the order of the data set."""
    found = []
    for shard in range(run.plan.shards):
        with tarfile.open(run.shard(shard) / TAR) as archive:
            names = sorted(name for name in archive.getnames() if name.endswith(".png"))
            found += [np.asarray(Image.open(io.BytesIO(archive.extractfile(name).read()))) for name in names]  # type: ignore[union-attr]
    return np.stack(found)


@torch.inference_mode()
def floats(run: RunDir) -> torch.Tensor:
    """What the worker's chain gives before it is rounded, in batches as it makes them."""
    worker, found = Worker(run), []
    chain, denoiser = run.plan.chain, worker.denoiser
    for shard in range(run.plan.shards):
        for rows in worker.batches(shard):
            loaded = worker.load(rows)
            x0 = denoiser.encode(torch.from_numpy(np.stack([item.pixels for item in loaded])))  # type: ignore[arg-type]
            told = denoiser.prepare(torch.tensor([row.source.label for row in rows]))
            predict = denoiser.predict if chain.sampler == "learned" else denoiser.predict_x0
            x = boomerang(
                x0,
                chain.level,
                chain.levels,
                lambda x, k, predict=predict, told=told: predict(x, k, told),
                noise_of([row.noise_key for row in rows], run.plan.model.state),
                run.plan.job.eta,
                sampler_of(chain.sampler, chain.snr),
            )
            found.append(denoiser.coder.decode(x))
    return torch.cat(found)


def noise_of(keys: list[bytes], shape: tuple[int, ...]) -> references.Noise:
    return lambda stream, step: torch.from_numpy(normal(keys, stream, step, shape))


@torch.inference_mode()
def reference(name: str, folder: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """diffusers' images of all rows, in the order of the data set."""
    chain, found = run.plan.chain, []
    rows = planned_rows(run.plan, run.index, run.secret, range(run.plan.rows))
    size = 1 if name == "ncsnpp" else len(rows)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        files = [Image.open(Path(run.plan.source.location) / row.source.path) for row in part]
        x = torch.from_numpy(np.stack([np.asarray(file) for file in files])).permute(0, 3, 1, 2) / 127.5 - 1
        noise = noise_of([row.noise_key for row in part], run.plan.model.state)
        indices = [int(t) for t in chain.t[1:]] if name in TOLD_INDICES else list(range(len(chain.t) - 1))
        case = Case(folder, indices, chain.level, [r.source.label for r in part], FAMILIES[name][1], noise, monkeypatch)
        found.append(FAMILIES[name][0](case, x))
    return torch.cat(found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_equals_diffusers(
    name: str,
    source: Path,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell: Callable[[str], None],
) -> None:
    folder = folder_of(name)
    run = by_two(PLAIN | FAMILIES[name][2] | {"dataset": str(source), "model": str(folder)}, tmp_path / "run")
    ours = floats(run)
    with monkeypatch.context() as patch:
        theirs = reference(name, folder, run, patch)
    off, most = float((ours - theirs).abs().max()), float(theirs.abs().max())
    tell(f"{name}: {run.plan.model.family}, equal to diffusers within {off:.1e} (values up to {most:.1f})")
    assert off < 1e-4
    rounded = ((theirs.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    written = outputs(run)
    assert np.abs(written - rounded).max() <= 1
    assert written.std(axis=0).mean() > 1


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_bytes_of_a_family_are_stable(
    name: str, source: Path, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """One worker of the command line and two of this process write the same, in whatever order."""
    job = PLAIN | FAMILIES[name][2] | {"dataset": str(source), "model": str(folder_of(name))}
    run, other = by_command_line(job, tmp_path / "one"), by_two(job, tmp_path / "two")
    assert run.plan.shards > 1
    for shard in range(run.plan.shards):
        assert (run.shard(shard) / TAR).read_bytes() == (other.shard(shard) / TAR).read_bytes()


def test_every_folder_is_tried() -> None:
    assert FAMILIES.keys() == FOLDERS.keys()
