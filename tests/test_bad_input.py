"""What people really have besides images: odd options, data sets, models, disks, machines. Each is one exact line."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boomgen.cli import main
from boomgen.drive import only_driver
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir

from .conftest import Complaint, PlanTiny, write_idx
from .disk.faults import FAIL_FROM_HERE
from .finished import finish, made, samples, write_portraits
from .source_checks import member, picture, write_tar
from .test_faults import command, place, preloaded

__all__ = ["place", "preloaded"]  # fixtures

# Data sets and options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t_boom", "said"),
    [
        ("-0.1", "t_boom -0.1 is outside the chain; expected 0 (the source) to 1 (purely synthetic)"),
        ("1.5", "t_boom 1.5 is outside the chain; expected 0 (the source) to 1 (purely synthetic)"),
        ("41/40", "t_boom 41/40 is outside the chain; expected 0 (the source) to 1 (purely synthetic)"),
        ("nan", "t_boom 'nan' is not a level; expected a number in [0, 1] or a level as 40/100"),
        ("much", "t_boom 'much' is not a level; expected a number in [0, 1] or a level as 40/100"),
    ],
)
def test_t_boom_outside_the_chain(complaint: Complaint, t_boom: str, said: str) -> None:
    assert complaint("anonymize", "--dataset", "fashion-sample", f"--t-boom={t_boom}") == said


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "the idx source, split 'train', has no images; expected at least one"),
        ([3, 12, 1], "label 12 in fashion-mnist; expected 0 to 9"),
    ],
)
def test_data_sets_that_do_not_fit(complaint: Complaint, tmp_path: Path, labels: list[int], said: str) -> None:
    source = write_idx(tmp_path / "source", np.zeros((len(labels), 8, 8), np.uint8), np.array(labels, int))
    job = ["--dataset", "fashion-mnist", "--data-dir", source, "--out", tmp_path / "run"]
    assert complaint("anonymize", *job) == said
    assert not (tmp_path / "run").exists()


def test_duplicate_keys_are_named(complaint: Complaint, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        write_tar(tmp_path / "set" / f"{name}.tar", member("0001.png", picture(1)))
    job = ["--dataset", tmp_path / "set", "--model", tiny_model, "--t-boom", "0.4", "--out", tmp_path / "run"]
    said = "key '0001' appears twice in the source, again in b.tar; expected unique keys: rename or remove one"
    assert complaint("anonymize", *job) == said


def test_one_class_is_a_data_set(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "photos" / "cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(1))
    run = finish(plan_tiny(tmp_path / "run", dataset=str(tmp_path / "photos")))
    assert run.plan.source.classes == ("cat",)
    assert {members["cls"] for members in samples(run).values()} == {b"0"}


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("unet/config.json", {"sample_size": [8, 9]}, "config.json: sample_size: Input should be a valid integer"),
        ("unet/config.json", {"sample_size": None}, "config.json: sample_size: Input should be a valid integer"),
        (
            "unet/config.json",
            {"in_channels": 2, "out_channels": 2},
            "has 2 channels in patches of 1; expected 1 (grey) or 3 (RGB) for each pixel of a patch",
        ),
        (
            "unet/config.json",
            {"in_channels": 3, "out_channels": 3},
            "its network does not load (Cannot load",
        ),
        (
            "unet/config.json",
            {"num_class_embeds": 5},
            "says in boomgen.yaml that class 10 is none, of 5 classes; expected the last one",
        ),
        ("boomgen.yaml", {"null_class": 10, "classes": ["a"]}, "names 1 classes in boomgen.yaml; expected 10"),
        ("boomgen.yaml", {"nul_class": 10}, "boomgen.yaml: nul_class: Extra inputs are not permitted"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "odd"}, "its scheduler does not load (odd is not"),
        ("scheduler/scheduler_config.json", {"beta_start": 2.0}, "abar does not fall from 1 to 0 in 1000 steps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps: Input should be"),
        ("unet/config.json", "{", "config.json: Expecting property name enclosed in double quotes"),
        ("unet/config.json", "[]", "config.json: not a mapping; expected a folder saved by diffusers"),
        ("unet/diffusion_pytorch_model.safetensors", "x", "its network does not load ("),
    ],
)
def test_models_that_do_not_fit(
    complaint: Complaint, tmp_path: Path, tiny_model: Path, tiny_source: Path, file: str, change: Any, said: str
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / file
    if isinstance(change, str):
        path.write_text(change)
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.write_text(json.dumps(change))
    job = ["--dataset", tiny_source, "--model", model, "--t-boom", "0.4", "--out", tmp_path / "run"]
    line = complaint("anonymize", *job)
    assert line.startswith(f"model {model}")
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_split_that_is_not_there_is_not_the_whole(complaint: Complaint, tmp_path: Path, tiny_model: Path) -> None:
    photos = write_portraits(tmp_path / "photos")
    job = ["--dataset", photos, "--model", tiny_model, "--t-boom", "0.4", "--out", tmp_path / "run"]
    said = f"{photos}: no split 'val', it is not divided into splits; drop --split"
    assert complaint("anonymize", *job, "--split", "val") == said


def test_a_level_that_changes_nothing_is_not_anonymous(
    complaint: Complaint, tiny_source: Path, tiny_model: Path
) -> None:
    job = ["--dataset", tiny_source, "--model", tiny_model, "--t-boom", "0.2", "--steps", "5", "--out", "run"]
    said = "--t-boom 0.2 is level 1 of 5, abar 0.9999: nearly the originals; use a greater --t-boom, more --steps"
    assert complaint("anonymize", *job) == f"{said}, or augment"


def test_places_that_exclude_each_other(complaint: Complaint, tmp_path: Path, tiny_model: Path) -> None:
    photos = write_portraits(tmp_path / "photos")
    job = ["--dataset", photos, "--model", tiny_model, "--t-boom", "0.4"]
    said = f"--dataset {photos} is a place itself; drop --data-dir {tmp_path}"
    assert complaint("anonymize", *job, "--data-dir", tmp_path, "--out", tmp_path / "run") == said
    inside = photos / "healthy_volunteers" / "run"
    said = f"--out {inside} lies inside the data set, which would grow by it; use a place outside"
    assert complaint("anonymize", *job, "--out", inside) == said


# Places to write ----------------------------------------------------------------------------------------------------


def boomgen(root: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "boomgen", *command(root, *more)]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    ("code", "said"), [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left on device")]
)
def test_a_disk_that_takes_nothing(place: Path, preloaded: dict[str, str], code: int, said: str) -> None:
    done = boomgen(place, preloaded | {"FAULTS": f"{place} 1 {FAIL_FROM_HERE} {code}"})
    out = place / "runs" / "run"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"boomgen: cannot write {out}: {said}; use another --out\n"
    assert not (place / "runs").exists()


def test_a_missing_place_is_made_and_a_file_in_the_way_is_not_touched(
    complaint: Complaint, tmp_path: Path, tiny_model: Path, tiny_source: Path
) -> None:
    job = ["--dataset", tiny_source, "--model", tiny_model, "--t-boom", "0.4", "--steps", "10"]
    assert main(["plan", *map(str, job), "--out", str(tmp_path / "a" / "b" / "run"), "--device", "cpu"]) == 0
    (tmp_path / "file").write_text("mine")
    file, below = tmp_path / "file", tmp_path / "file" / "run"
    assert complaint("anonymize", *job, "--out", file) == f"{file} exists and is no run folder; use another --out"
    said = f"cannot write {below}: Not a directory; use another --out"
    assert complaint("anonymize", *job, "--out", below) == said
    assert file.read_text() == "mine"


def test_a_second_driver_is_refused_while_the_first_works(plan_tiny: PlanTiny, tmp_path: Path, boomgen: Any) -> None:
    run = plan_tiny(tmp_path / "run", steps=1000, shard_size=8)  # seconds of work
    line = [sys.executable, "-m", "boomgen", "resume", str(run.path), "--device", "cpu", "--workers", "1"]
    first = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while first.poll() is None and not run.logs.exists():
        time.sleep(0.05)
    second = boomgen("resume", run.path, "--device", "cpu", "--workers", 1, check=False)
    closing = boomgen("finalise", run.path, check=False)
    assert first.poll() is None, "the first was done too soon"
    for refused in (second, closing):
        assert refused.returncode == 1
        assert refused.stderr == (
            f"boomgen: {run.path} is being made by another boomgen; wait for its end, or stop it and go on with: "
            f"boomgen resume {run.path}\n"
        )
    first.kill()
    first.communicate()
    with only_driver(run):  # the lock went with the first
        pass


def test_of_two_planners_the_second_joins(
    tmp_path: Path, tiny_model: Path, tiny_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the folder and the rename, another plan comes to be there."""
    job = Job(mode="anonymize", dataset=str(tiny_source), model=str(tiny_model), t_boom="0.4", steps=10)
    out = Launch(out=str(tmp_path / "run"), device="cpu")
    first: list[bytes] = []
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if not first:
            monkeypatch.setattr(Path, "rename", rename)
            first.append(prepare(job, out).secret)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert prepare(job, out).secret == first[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_planner_left_is_cleared_away(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    import platform

    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".run.{dead.pid}@{platform.node()}.planning-00000000"
    alive = tmp_path / f".run.{os.getppid()}@{platform.node()}.planning-00000000"
    elsewhere = tmp_path / f".run.{dead.pid}@another.planning-00000000"
    for folder in (left, alive, elsewhere):
        folder.mkdir()
    plan_tiny(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run", alive.name, elsewhere.name}


# Machines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place with names that are not ASCII, after a run there, and what was said."""
    root = shutil.copytree(place, tmp_path_factory.mktemp("usual") / "wörk")
    for name in ("😀", "ü"):
        shutil.copy(root / "source" / "dog" / "0.png", root / "source" / "dog" / f"{name}.png")
    done = boomgen(root, dict(os.environ))
    assert done.returncode == 0, done.stderr
    return root, done.stdout


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"CLOCK": "back"}, id="the clock goes back at every look", marks=pytest.mark.slow),
        pytest.param({"HOME": None}, id="no home", marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, id="a locale without UTF-8"),
    ],
)
def test_odd_machines_write_the_same_bytes(
    odd: dict[str, str | None], usual: tuple[Path, str], preloaded: dict[str, str]
) -> None:
    root, told = usual
    expected = made(RunDir(root / "runs" / "run"))
    shutil.rmtree(root / "runs")
    changed = preloaded | {name: value for name, value in odd.items() if value is not None}
    done = boomgen(root, {name: value for name, value in changed.items() if odd.get(name, "") is not None})
    assert done.returncode == 0, done.stderr
    assert made(RunDir(root / "runs" / "run")) == expected
    assert done.stdout.encode("ascii", "backslashreplace") == told.encode("ascii", "backslashreplace")
