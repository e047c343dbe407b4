"""Every shipped job, with 8 images and a tiny model of its family."""

from pathlib import Path

import pytest

from boomgen import catalog
from boomgen.finalise import finalise
from boomgen.levels import parse_t_boom
from boomgen.options import job_and_launch, read_job_file
from boomgen.prepare import prepare
from boomgen.worker import Worker

from .families.folders import save
from .source_checks import picture

JOBS = sorted(catalog.shipped("jobs").glob("*.yaml"))
STAND_INS = {"DiT": "dit", "stable": "sd1", "ncsnpp": "ncsnpp", "ddpm": "ddpm"}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of two images, which stand for any data set."""
    root = tmp_path_factory.mktemp("set")
    for number in range(10):
        folder = root / "train" / f"class {number % 5}, kind of"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture(number))
    return root


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_runs(path: Path, people: Path, tmp_path: Path) -> None:
    options = read_job_file(path)
    preset = catalog.dataset(options["dataset"])
    model = options.get("model") or (preset.model if preset else "")
    name = next((folder for part, folder in STAND_INS.items() if part in model), "ddpm")
    if options.get("sampler") == "predictor-corrector":
        name = "ncsnpp"
    if path.stem != "quickstart":
        options |= {"dataset": str(people), "model": str(save(name, tmp_path / "model"))}
    options["t_boom"] = str(float(parse_t_boom(str(options["t_boom"]))[0]))
    options["steps"] = 10  # the same noise on a shorter chain
    job, launch = job_and_launch(options | {"limit": 8, "device": "cpu", "out": str(tmp_path / "run")})
    run = prepare(job, launch)
    worker = Worker(run)
    for shard in range(run.plan.shards):
        worker.make_shard(shard)
    finalise(run)
    status = run.status()
    assert (status.ok, status.failed) == (8 * job.variants, {})
    assert f"`{path.stem}`" in (path.parent / "README.md").read_text() or path.stem == "quickstart"
