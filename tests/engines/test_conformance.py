"""What every engine has to bear, by the real programs. Each function is a line of the table that is shown at the end.

| scenario | local, Ray | accelerate, torchrun | SLURM |
|---|---|---|---|
| worker killed | is replaced | ends the launch | fails its element; the closing job tells |
| worker hung | is killed and replaced | the other makes its shards | the time limit's warning requeues it |
| sick worker | rests | fails at all it tries; the other makes it | fails its element |
| engine lost | its driver; of Ray, a node | the launcher: ranks need none | a node; the other element is requeued |
"""

import functools
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from boomgen import env, manifest
from boomgen.job import Launch
from boomgen.prepare import prepare
from boomgen.progress import AT_WORK, Look, look
from boomgen.run import RunDir, ranges
from boomgen.shard import PART
from boomgen.tell import status_text
from boomgen.verify import verify

from ..conftest import PlanTiny
from ..finished import finish, made, tree
from ..s3.server import S3
from ..s3.test_output import same
from ..test_bytes import LONG, LONGER
from .engines import LAUNCHERS, NAMES, Ended, Engine, Going, wait_for

IN_CI = {
    "identity": NAMES,
    "worker killed": NAMES,
    "resumed elsewhere": NAMES,
    "worker hung": ("local", "ray"),
    "sick worker": ("local", "torchrun"),
    "poison shard": ("local", "ray"),
    "engine lost": ("local", "ray"),
    "in a store": ("local", "ray"),
    "second finish": ("local", "ray"),
    "foreign environment": ("local", "ray"),
}
"""The cells of `make test`; `make engines` runs all."""

SHARDS = 13
NAME = "a $(touch x) 'run' 100% %j #1"  # means something to shells and to SLURM
ELSEWHERE = dict.fromkeys(NAMES, "local") | {"local": "ray"}
LEFT = dict.fromkeys(NAMES, "killed") | {"local": "lost", "ray": "stopped"}
"""What leaves a run unfinished."""

Expected = dict[str, tuple[int, str]]  # the exit code, and words
KILLED: Expected = dict.fromkeys(LAUNCHERS, (1, "Signal 9 (SIGKILL)")) | {
    "local": (0, "died with exit code -9"),
    "ray": (0, " died: "),
    "slurm": (1, f" of {SHARDS} shards are missing"),
}
HUNG: Expected = dict.fromkeys(LAUNCHERS, (0, "")) | dict.fromkeys(("local", "ray"), (0, "hung and was killed"))
HUNG |= {"slurm": (0, "start 2")}
SICK: Expected = dict.fromkeys(LAUNCHERS, (0, "File too large")) | {"slurm": (1, " shards are missing")}
SICK |= dict.fromkeys(("local", "ray"), (0, " failed at 3 shards in a row and rests while others make some; see "))
LOST: Expected = dict.fromkeys(LAUNCHERS, (-signal.SIGKILL, f"{SHARDS} of {SHARDS} whole")) | {
    "local": (-signal.SIGKILL, ""),
    "ray": (0, "node was terminated unexpectedly"),
    "slurm": (0, "start 2"),
}
PATIENCE = {"local": ("--patience", 5), "ray": ("--patience", 5), "slurm": ("--time", 3)}

EngineOf = Callable[[str], Engine]


def on_each_engine(scenario: str) -> pytest.MarkDecorator:
    """The same on every engine."""
    marks = {name: () if name in IN_CI[scenario] else (pytest.mark.slow,) for name in NAMES}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in NAMES])


class Story(NamedTuple):
    """A run that something happened to, and that was finished elsewhere if it had ended too early."""

    run: RunDir
    ended: Ended
    missing: list[int]
    told: str  # by `boomgen status`, before it was finished


def leave_alone(going: Going) -> None:
    """Nothing happens to it."""


def kill_one(going: Going) -> None:
    """One that `boomgen status` shows in mid-shard, once somebody's speed is known: before its first batch, none is."""

    def shown() -> tuple[Look, int] | None:
        assert not going.over(), going.end()
        found, in_hand = look(going.run), going.workers()
        at_work = [seen.word.pid for seen in found.workers if seen.state in AT_WORK and seen.word.pid in in_hand]
        return (found, at_work[-1]) if found.rate and at_work else None

    found, victim = wait_for(shown)
    assert found.made >= 8
    assert found.seconds["infer"] > 0
    assert f"boomgen status {shlex.quote(str(going.run.path))} --watch" in status_text(going.run)
    os.kill(victim, signal.SIGKILL)


def lose(going: Going) -> None:
    going.busy()
    going.lose()


def stop(going: Going) -> None:
    going.busy()
    going.stop()


@pytest.fixture(scope="session")
def story(engine_of: EngineOf, plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Story]:
    """Made once for each engine and event: several scenarios look at one run, since starts are what tests cost."""

    @functools.cache
    def of(name: str, event: str) -> Story:
        run = plan_tiny(tmp_path_factory.mktemp(name) / NAME, **({} if event == "calm" else LONG))
        going = engine_of(name).start(run)
        {"calm": leave_alone, "killed": kill_one, "lost": lose, "stopped": stop}[event](going)
        ended = going.end()
        assert going.gone()  # of a driver that was killed, workers end after it
        missing, told = run.missing(), status_text(run)
        if missing:
            engine_of(ELSEWHERE[name]).finish(run)
        return Story(run, ended, missing, told)

    return of


def said(ended: Ended, expected: tuple[int, str]) -> None:
    code, words = expected
    assert ended.code == code, ended
    assert words in ended.out + ended.err


@on_each_engine("identity")
def test_identity(name: str, story: Any, undisturbed: Any) -> None:
    """Two workers of an engine that makes all and closes the run: the bytes of one worker in one process."""
    run, ended, missing, _ = story(name, "calm")
    assert (ended.code, missing) == (0, []), ended
    assert made(run) == undisturbed()
    assert not run.staging.exists()
    assert not list(verify(RunDir(run.path)))


@on_each_engine("worker killed")
def test_worker_killed(name: str, story: Any, undisturbed: Any) -> None:
    """SIGKILL in mid-shard. Where there is a driver, it goes on by itself; elsewhere the engine tells and ends."""
    found = story(name, "killed")
    said(found.ended, KILLED[name])
    assert bool(found.missing) == (found.ended.code != 0)
    assert made(found.run) == undisturbed(**LONG)
    if not found.missing:
        assert found.ended.out == f"{found.told}\n"  # `boomgen status` and nothing of Ray's
        lines = found.ended.err.splitlines()
        assert not [line for line in lines if not line.startswith("shard ") and " images, " not in line]


@on_each_engine("resumed elsewhere")
def test_resumed_elsewhere(name: str, story: Any, undisturbed: Any) -> None:
    """What one engine left unfinished, another finishes, to the same bytes."""
    found = story(name, LEFT[name])
    assert 0 < len(found.missing) < SHARDS
    assert f"{SHARDS - len(found.missing)} of {SHARDS} whole, missing: number {ranges(found.missing)}" in found.told
    (following,) = [line for line in found.told.splitlines() if line.startswith("next ")]
    assert shlex.split(following) == ["next", "boomgen", "resume", str(found.run.path)]
    assert made(found.run) == undisturbed(**LONG)
    assert not found.run.staging.exists()


@on_each_engine("worker hung")
def test_worker_hung(name: str, engine_of: EngineOf, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """SIGSTOP in mid-shard: it says nothing any more, and does not hear SIGTERM."""
    run = plan_tiny(tmp_path / "run", **LONG)
    going = engine_of(name).start(run, *PATIENCE.get(name, ()), workers=1)
    stopped = going.busy(workers=1)[-1]
    os.kill(stopped, signal.SIGSTOP)
    if name in LAUNCHERS:
        wait_for(lambda: not run.missing())
        os.kill(stopped, signal.SIGCONT)
    ended = going.end()
    said(ended, HUNG[name])
    assert going.gone()
    if ended.code:
        engine_of(name).finish(run)
    assert made(run) == undisturbed(**LONG)


@on_each_engine("sick worker")
def test_sick_worker(name: str, engine_of: EngineOf, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """One that can write no file any more takes nothing from those in order."""
    run = plan_tiny(tmp_path / "run", **LONGER)
    going = engine_of(name).start(run)
    psutil.Process(going.busy()[-1]).rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    ended = going.end()
    said(ended, SICK[name])
    if name in ("local", "ray"):
        assert ended.err.count(SICK[name][1]) == 1
        assert ended.err.count("File too large") < 6
    if ended.code:
        engine_of(name).finish(run)
    assert made(run) == undisturbed(**LONGER)


@on_each_engine("poison shard")
def test_poison_shard(name: str, engine_of: EngineOf, plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Shards that always fail are tried three times and named while the rest is made; once the cause is gone, the same
    command finishes."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(48):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    run, calm = (plan_tiny(tmp_path / name, dataset=str(folder.parent), shard_size=8) for name in ("run", "calm"))
    expected = made(finish(calm))
    parts = [manifest.read_part(calm.shard(number) / PART) for number in (2, 3, 5)]
    poisoned = [folder.parent / part["source_key"][0].as_py() for part in parts]
    for image in poisoned:
        image.rename(image.with_suffix(".away"))
    ended = engine_of(name).start(run, workers=1).end()
    missing = run.missing()
    assert missing == [2, 3, 5]
    said(ended, (1, "boomgen: "))
    told = ended.out + ended.err
    count = "3" if name in ("local", "ray") else "[123]"  # what other ranks set aside, they tell
    assert re.search(
        rf"boomgen: {count} shards failed 3 times and were set aside; shard [235]: FileNotFoundError", told
    )
    assert f"; see boomgen logs {run.path}\n" in told
    logs = [log.read_text() for log in run.logs.glob("worker-*.log")]
    assert [max(log.count(f"shard {shard} failed") for log in logs) for shard in missing] == [3, 3, 3]
    assert list(run.staging.iterdir()) == []
    for image in poisoned:
        image.with_suffix(".away").rename(image)
    engine_of(name).finish(run)
    assert made(run) == expected


@on_each_engine("engine lost")
def test_engine_lost(name: str, story: Any, undisturbed: Any) -> None:
    """The loss of what no worker is: see the table above."""
    found = story(name, "lost")
    said(found.ended, LOST[name])
    if name == "slurm":
        assert found.ended.err.count("start 2") == 2
    assert made(found.run) == undisturbed(**LONG)
    assert not found.run.staging.exists()


@on_each_engine("in a store")
def test_in_a_store(
    name: str, s3: S3, engine_of: EngineOf, plan_tiny: PlanTiny, secret_file: Path, tmp_path: Path
) -> None:
    """Outputs go to S3, whose keys only the environment of the command holds; a worker is killed in mid-shard."""
    here = plan_tiny(tmp_path / "here", **LONG)
    private = {"private_dir": str(tmp_path / "private"), "secret_file": str(secret_file)}
    run = prepare(here.plan.job, Launch(out=f"{s3.url}/run", device="cpu", **private))
    going = engine_of(name).start(run)
    kill_one(going)
    said(going.end(), KILLED[name])
    if run.missing():
        engine_of(name).finish(run)
    same(RunDir(run.path), finish(here))


@on_each_engine("second finish")
def test_second_finish(name: str, story: Any, engine_of: EngineOf) -> None:
    """The same command again: it says in a few lines that all is there, and touches nothing."""
    run = story(name, "calm").run
    before = tree(run.path)
    ended = engine_of(name).start(run).end()
    said(ended, (0, "nothing to submit" if name == "slurm" else "7 of 7 whole"))
    assert ended.err == ""
    assert len(ended.out.splitlines()) < 12
    assert tree(run.path) == before


@on_each_engine("foreign environment")
def test_foreign_environment(
    name: str, engine_of: EngineOf, plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was planned for other software is refused by every worker, in one line that says what differs."""
    real = env.environment
    monkeypatch.setattr(env, "environment", lambda device: real(device) | {"torch": "9.9"})
    run = plan_tiny(tmp_path / "run")
    monkeypatch.undo()
    ended = engine_of(name).start(run, workers=1).end()
    line = f"boomgen: this device is not of the planned class: torch 9.9 (here {torch.__version__}); run on the planned"
    said(ended, (1, line))
    assert "boomgen/worker.py" not in ended.out + ended.err  # where a traceback would lead
    assert not run.published()
