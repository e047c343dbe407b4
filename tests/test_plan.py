"""The plan: every default filled in, frozen, the same for the same job; and what the network is compiled for."""

import itertools
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boomgen import catalog, images, models
from boomgen.choose import COMPILE_PAYS_FROM, shard_size
from boomgen.errors import BoomgenError, UsageError
from boomgen.job import Job, Launch
from boomgen.models import class_map
from boomgen.models.conditions import of_classes
from boomgen.models.network import build, example_inputs, flops, load_compiled
from boomgen.plan import planned_rows, read_plan
from boomgen.prepare import prepare, resolve
from boomgen.worker import Worker

from .conftest import PlanTiny, write_idx

FASHION = catalog.datasets()["fashion-mnist"].classes


def test_the_same_job_has_the_same_plan(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    one, other = plan_tiny(tmp_path / "one"), plan_tiny(tmp_path / "other")
    for name in ("plan.json", "index.parquet", "secret"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()


def test_a_plan_reads_back_as_it_was_written(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = plan_tiny(tmp_path / "run")
    assert read_plan(run.path / "plan.json").to_bytes() == (run.path / "plan.json").read_bytes()
    assert run.plan.chain.levels.level(Fraction(4, 10)) == run.plan.chain.level == 4


def test_positions_of_all_shards_are_the_rows_once(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    run = plan_tiny(tmp_path / "run", mode="augment", variants=3)
    positions = list(itertools.chain.from_iterable(run.plan.positions(i) for i in range(run.plan.shards)))
    assert positions == list(range(300))
    rows = planned_rows(run.plan, run.index, run.secret, range(300))
    assert sorted((row.source_row, row.variant) for row in rows) == list(itertools.product(range(100), range(3)))
    assert len({row.noise_key for row in rows}) == 300
    assert [row.key for row in rows] == [f"{i:08d}" for i in range(300)]


def test_a_plan_of_another_version_is_refused(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    from boomgen.shard import sealed

    run = plan_tiny(tmp_path / "run")
    record = json.loads((run.path / "plan.json").read_text())
    (run.path / "plan.json").write_bytes(sealed({**record, "schema_version": 2}))
    with pytest.raises(BoomgenError, match="schema version 2, this boomgen reads 1"):
        read_plan(run.path / "plan.json")


@pytest.mark.parametrize(
    ("rows", "batch", "size"), [(1, 64, 64), (1000, 64, 64), (10_000, 64, 192), (1_281_167, 64, 9984), (10, 1, 1)]
)
def test_shards_are_whole_batches_of_moderate_number(rows: int, batch: int, size: int) -> None:
    assert shard_size(rows, batch) == size


def test_presets_fill_the_gaps_and_flags_win() -> None:
    job = resolve(Job(mode="anonymize", dataset="fashion-sample")).job
    assert (job.model, job.t_boom, job.steps, job.fit, job.split) == ("fashion-patched-ddpm", "0.4", None, "pad", None)
    assert (job.linkage, job.labels) == ("private", "keep")
    job = resolve(Job(mode="augment", dataset="fashion-sample", t_boom="20/50", fit="crop")).job
    assert (job.t_boom, job.steps, job.fit, job.linkage) == ("20/50", 50, "crop", "public")


def test_classes_are_matched_by_name_or_not_at_all() -> None:
    info = models.inspect("fashion-patched-ddpm")
    assert class_map(info, FASHION) == tuple(range(10))
    assert class_map(info, ("bag", "COAT")) == (8, 4)
    assert class_map(info, ("bag", "zebra")) is None
    unnamed = info.model_copy(update={"classes": ()})
    assert class_map(unnamed, ("x", "y")) == (0, 1)
    assert class_map(unnamed, tuple(map(str, range(11)))) is None
    assert class_map(info.model_copy(update={"class_count": 0}), ("bag",)) is None


def test_the_condition_reaches_the_network(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    worker = Worker(plan_tiny(tmp_path / "run"))
    assert worker.plan.network.classes == tuple(range(10))
    (told,) = worker.denoiser.prepare(torch.tensor([3, -1, 9]))
    assert told.tolist() == [3, 10, 9]


def test_labels_beyond_the_known_names_are_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_idx(tmp_path / "source", np.zeros((4, 28, 28), np.uint8), np.array([0, 1, 2, 11]), "t10k")
    job = Job(mode="anonymize", dataset="fashion-mnist", data_dir=str(source), split="test", model=str(tiny_model))
    with pytest.raises(UsageError, match=r"label 11 in fashion-mnist; expected 0 to 9"):
        prepare(job, Launch(out=str(tmp_path / "run"), device="cpu"))
    assert not (tmp_path / "run").exists()


def test_pickled_weights_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UsageError, match="pickled weights are programs: save it again with safetensors, or trust its"):
        models.inspect(str(folder))


def test_other_families_are_recognised_and_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace("UNet2DModel", "UNet2DConditionModel"))
    with pytest.raises(UsageError, match="is a None; expected one of StableDiffusionPipeline"):
        models.inspect(str(folder))
    config.write_text(config.read_text().replace("UNet2DConditionModel", "UNet3DConditionModel"))
    with pytest.raises(UsageError, match="is a UNet3DConditionModel; expected one of UNet2DModel"):
        models.inspect(str(folder))
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(UsageError, match="is a DiTPipeline without unet/ or transformer/; expected a whole"):
        models.inspect(str(folder))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("scheduler", {"prediction_type": "flow"}, "predicts flow; expected epsilon, sample, v_prediction"),
        ("scheduler", {"thresholding": True}, "clips by thresholding"),
        ("scheduler", {"clip_sample_range": 3.0}, "or to another range"),
        ("unet", {"out_channels": 3}, "has 3 output and 1 input channels; expected as many, or twice as many"),
        ("unet", {"time_embedding_type": "fourier"}, "has a fourier time embedding and predicts epsilon; expected"),
    ],
)
def test_a_model_that_would_run_and_be_wrong_is_refused(
    tiny_model: Path, tmp_path: Path, file: str, change: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = folder / file / ("config.json" if file == "unet" else "scheduler_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UsageError, match=said):
        models.inspect(str(folder))


@pytest.mark.parametrize(("null_class", "labels"), [(False, True), (False, False), (True, False)])
def test_images_without_a_label_need_a_class_for_none(
    tiny_model: Path, tmp_path: Path, null_class: bool, labels: bool
) -> None:
    """A model without a class for none would show them as its class 0."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    if not null_class:
        (folder / "boomgen.yaml").unlink()
    for number in range(4):
        place = tmp_path / "source" / (f"class {number % 2}" if labels else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / f"{number}.png")
    job = Job(mode="augment", dataset=str(tmp_path / "source"), model=str(folder), t_boom="0.4", steps=10)
    if labels or null_class:
        classes = prepare(job, Launch(out=str(tmp_path / "run"), device="cpu")).plan.network.classes
        assert classes == ((0, 1) if labels else None)
    else:
        with pytest.raises(UsageError, match="needs a class of its own for every image"):
            prepare(job, Launch(out=str(tmp_path / "run"), device="cpu"))


def test_columns_are_the_jobs_before_the_presets(tiny_model: Path, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "other": datasets.Image(), "n": datasets.Value("int64")})
    pictures = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 2)]
    data = datasets.Dataset.from_dict({"image": pictures, "other": pictures[::-1], "n": [0, 1]}, features=features)
    data.save_to_disk(tmp_path / "saved")
    columns = {"image_column": "other", "label_column": "n"}
    job = Job(mode="augment", dataset=str(tmp_path / "saved"), model=str(tiny_model), t_boom="0", steps=10, **columns)
    run = prepare(job, Launch(out=str(tmp_path / "run"), device="cpu"))
    rows = run.index.take([0, 1])
    assert [row.label for row in rows] == [0, 1]
    assert [int(images.decode(run.plan.source.open().read(row), 1)[0, 0, 0]) for row in rows] == [2, 1]


def test_a_folder_called_like_a_data_set_of_people_drops_their_names(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "LFW").mkdir()
    job = Job(mode="anonymize", dataset=f"{tmp_path}/LFW/", model=str(tiny_model), t_boom="0.5")
    assert resolve(job).job.labels == "drop"
    assert resolve(job.model_copy(update={"labels": "keep"})).job.labels == "keep"
    assert resolve(job.model_copy(update={"mode": "augment"})).job.labels == "keep"


@pytest.mark.parametrize(("written", "means"), [(True, "yes"), (False, "no"), ("yes", "yes"), (None, None)])
def test_yes_and_no_are_words_in_yaml_too(written: Any, means: str | None) -> None:
    assert Job(mode="augment", dataset="x", compile=written).compile == means


def test_a_model_that_changed_after_planning_is_refused(plan_tiny: PlanTiny, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    run = plan_tiny(tmp_path / "run", model=str(folder))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(BoomgenError, match="has changed since the plan was made"):
        Worker(run)


def test_flops_are_those_of_the_convolutions() -> None:
    """A known count: the embedded net has about half a GFLOP a call."""
    info = models.inspect("fashion-patched-ddpm")
    assert 0.4e9 < flops(info, of_classes(info, None)) < 0.6e9


def test_compilation_is_chosen_by_cost(tmp_path: Path) -> None:
    small = Job(mode="anonymize", dataset="fashion-sample")
    run = prepare(small, Launch(out=str(tmp_path / "run"), device="cpu"))
    assert run.plan.calls * run.plan.network.flops < COMPILE_PAYS_FROM
    assert run.plan.network.package_sha256 is None
    assert run.plan.network.flops / run.plan.network.batch_size * 10_000 * 40 > COMPILE_PAYS_FROM


@pytest.fixture(scope="module")
def compiled(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return plan_tiny(tmp_path_factory.mktemp("compiled") / "run", compile="yes", dtype="float32")


def test_the_compiled_network_is_the_network(compiled: Any) -> None:
    plan = compiled.plan
    inputs = example_inputs(plan.model, plan.network.batch_size, of_classes(plan.model, None))
    inputs[0].normal_(generator=torch.Generator().manual_seed(0))
    inputs[2].copy_(torch.arange(8))
    with torch.no_grad():
        eager = build(plan.model, torch.float32)(*inputs)
        torch.testing.assert_close(load_compiled(compiled.package)(*inputs), eager, atol=1e-5, rtol=1e-5)


def test_a_worker_with_a_package_needs_no_diffusers(compiled: Any) -> None:
    code = (
        "import sys; from boomgen.run import RunDir; from boomgen.worker import Worker;"
        f"Worker(RunDir({str(compiled.path)!r})).make_shard(0); print('diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_another_package_is_refused(compiled: Any) -> None:
    good = compiled.package.read_bytes()
    compiled.package.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(BoomgenError, match="is missing or not the planned one"):
            Worker(compiled)
    finally:
        compiled.package.write_bytes(good)
