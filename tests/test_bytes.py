"""The first promise: the same bytes from any number of workers and threads, in any order, through kills and resumes."""

import contextlib
import os
import random
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from boomgen import drive
from boomgen.cli import main
from boomgen.errors import BoomgenError
from boomgen.job import Launch
from boomgen.run import RunDir
from boomgen.shard import FAILPOINTS
from boomgen.verify import verify
from boomgen.worker import Worker

from .conftest import SECRET, PlanTiny
from .driver import Driver, users_of
from .finished import command_line, finish, made
from .test_progress import two_at_work

CHANCE = random.Random(20)
LONG = {"steps": 100, "shard_size": 8}  # 13 shards of one batch, 40 network calls each: about half a second
AUGMENT = {"mode": "augment", "variants": 3, "seed": 5, "limit": 40, "shard_size": 8}
LONGER = AUGMENT | {"steps": 100}


# Workers, threads, order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [{}, AUGMENT])
def test_any_order(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, job: dict[str, Any]) -> None:
    """Shards made in reversed and in random order, some twice, by one worker or by two in turn, in other folders."""
    for turn in range(3):
        run = plan_tiny(tmp_path / f"run{turn}", **job)
        workers = [Worker(run), Worker(run)]
        order = list(range(run.plan.shards))[::-1]
        if turn:
            order = CHANCE.sample(order, len(order)) + CHANCE.choices(order, k=3)
        for place, number in enumerate(order):
            workers[place % turn if turn else 0].make_shard(number)
        assert main(["finalise", str(run.path)]) == 0
        assert made(run) == undisturbed(**job)


def test_threads(plan_tiny: PlanTiny, undisturbed: Any, boomgen: Any, tmp_path: Path) -> None:
    """A real worker process with two threads makes what one thread makes."""
    run = plan_tiny(tmp_path / "run", limit=32)
    limits = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    boomgen("resume", run.path, "--device", "cpu", "--workers", 1, env=os.environ | limits)
    assert made(run) == undisturbed(limit=32)


def test_bytes_follow_the_secret(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """The check can fail: another secret, seed or eta changes every tar."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET[::-1].hex())
    run = plan_tiny(tmp_path / "private")
    other = tmp_path / "other"
    job = run.plan.job
    assert main(command_line(job, other, "--secret-file", str(secret), verb="plan")) == 0
    found, same = made(finish(RunDir(other))), undisturbed()
    assert not {name for name in found if name.endswith(".tar") and found[name] == same[name]}
    for change in ({"seed": 6}, {"eta": 0.5}):
        found, same = made(finish(plan_tiny(tmp_path / str(change), **AUGMENT | change))), undisturbed(**AUGMENT)
        assert not {name for name in found if name.endswith(".tar") and found[name] == same[name]}


# Kills -------------------------------------------------------------------------------------------------------------


def test_killed_at_every_failpoint(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """A worker SIGKILLed at each named moment of publishing: the shard is whole only after the last one, and whoever
    comes next makes the same bytes."""
    run = plan_tiny(tmp_path / "run")
    for number, failpoint in enumerate(FAILPOINTS):
        assert _killed(run, f"{failpoint}:{number}", number) == -signal.SIGKILL
        assert (number in run.published()) == (failpoint == "published")
        assert len(list(run.staging.iterdir())) == number + (failpoint != "published")
        if number not in run.published():
            Worker(run).make_shard(number)
    assert run.missing() == []
    assert main(["finalise", str(run.path)]) == 0
    assert made(run) == undisturbed()
    assert not run.staging.exists()
    assert not list(verify(RunDir(run.path)))


def _killed(run: RunDir, failpoint: str, number: int) -> int:
    """The exit code of a worker process that is to die at a failpoint."""
    child = os.fork()
    if child == 0:
        os.environ["BOOMGEN_FAILPOINT"] = failpoint
        signal.alarm(60)
        try:
            Worker(run).make_shard(number)
        finally:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_watched_while_a_worker_is_killed(
    plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Meanwhile another process sees who works and how fast. One of two workers is SIGKILLed: the driver goes on to the
    same bytes, its last line tells the end, its log who died."""
    run = plan_tiny(tmp_path / "run", **LONGER)
    driver = Driver(run)
    driver.wait_for(lambda: two_at_work(run, capsys, driver.workers()))
    os.kill(next(pid for pid in driver.workers() if pid in users_of(run.staging)), signal.SIGKILL)
    code, _, err = driver.end()
    assert code == 0, err
    assert err.count("died with exit code -9") == 1, err
    assert err.splitlines()[-1].startswith("120/120 images, read "), err
    capsys.readouterr()
    assert main(["logs", str(run.path), "--failed"]) == 0
    assert capsys.readouterr().out.count(" lost: worker") == err.count("died with exit code -9")
    assert not run.workers.exists()
    assert made(run) == undisturbed(**LONGER)
    assert not run.staging.exists()
    assert driver.no_orphan()


def test_stopped(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """SIGTERM or SIGINT to the driver: exit 75 in one line, no worker and nothing half-made is left. Going on gives the
    same bytes."""
    run = plan_tiny(tmp_path / "run", **LONG)
    for sent in (signal.SIGTERM, signal.SIGINT):
        driver = Driver(run)
        driver.wait_published(len(run.published()) + 1)
        workers = driver.workers()
        driver.process.send_signal(sent)
        for pid in workers if sent == signal.SIGTERM else ():  # a scheduler tells all processes of a job
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        code, out, err = driver.end()
        assert driver.no_orphan()
        assert (code, out) == (75, "")
        said = f"stopped ({sent.name}); what is whole stays, go on with: boomgen resume {run.path}"
        assert err.splitlines()[-1] == f"boomgen: {said}"
        assert list(run.staging.iterdir()) == []
    finish_missing(run)
    assert made(run) == undisturbed(**LONG)


def test_stopped_while_planning(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """SIGTERM while the plan is made: exit 75, and no half-made folder with a secret in it stays behind."""
    job, out = plan_tiny(tmp_path / "other").plan.job, tmp_path / "new"
    driver = Driver(RunDir(tmp_path / "other"), "boomgen", *command_line(job, out / "run", verb="anonymize"))
    driver.wait_for(lambda: any(out.glob(".run.*.planning-*")))
    driver.process.send_signal(signal.SIGTERM)
    code, _, err = driver.end()
    assert code == 75, err
    assert err.splitlines()[-1] == "boomgen: stopped (SIGTERM); run the same command again"
    assert not out.exists()


def test_resumed_from_a_thread(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """The Python form also works beside the main thread, where no signal handler can be set."""
    run = plan_tiny(tmp_path / "run")
    worker = Worker(run)
    for number in run.missing():
        worker.make_shard(number)
    with ThreadPoolExecutor() as pool:
        pool.submit(drive.resume, run, Launch()).result()
    assert run.status().finalised
    assert made(run) == undisturbed()


def finish_missing(run: RunDir) -> None:
    worker = Worker(run)
    for number in run.missing():
        worker.make_shard(number)
    assert main(["finalise", str(run.path)]) == 0


# Shards that fail --------------------------------------------------------------------------------------------------


SICK = """#!{python}
import os, sys; sys.stdin.readline()
def say(text): os.write(1, text.encode() + b"\\n")
say('{{"kind": "ready", "shard": -1}}')
for line in sys.stdin:
    shard = int(line)
    open({log!r}, "a").write(f"{{os.getpid()}} {{shard}}\\n")
    {what}
    say('{{"kind": "done", "shard": %d, "rows": 1, "ok": 1}}' % shard)
"""
DIES = "if shard == 2: os.kill(os.getpid(), 9)"
FAILS = """if shard == 2:
        say('{{"kind": "failed", "shard": 2, "text": "CUDA error"}}')
        sys.exit(1)"""


@pytest.mark.parametrize(("what", "told"), [(DIES, "died with exit code -9"), (FAILS, "CUDA error")])
@pytest.mark.parametrize("workers", [1, 3])
def test_sick_device(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str, workers: int
) -> None:
    """A shard that kills its worker, or breaks its device for good, costs three workers and no other shard a try: the
    worker here is a stand-in that breaks on purpose, in a process of its own."""
    from boomgen.engines.local import LocalEngine

    run, log = plan_tiny(tmp_path / "run"), tmp_path / "log"
    stand_in = tmp_path / "python"
    stand_in.write_text(
        SICK.format(python=sys.executable, log=str(log), what=what.replace("{{", "{").replace("}}", "}"))
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    with pytest.raises(BoomgenError, match=f"1 shards failed 3 times and were set aside; shard 2: .*{told}"):
        list(LocalEngine(run, ["cpu"] * workers).run(range(7)))
    tries = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(shard) for _, shard in tries) == [0, 1, 2, 2, 2, 3, 4, 5, 6]
    assert len({pid for pid, shard in tries if shard == "2"}) == 3


def test_failure_of_the_device_ends_the_worker(capsys: pytest.CaptureFixture[str]) -> None:
    """A failed read leaves the worker ready for more; any other failure ends it, so that a fresh one starts."""
    from boomgen.engines.local import serve_shard

    class Failing:
        def __init__(self, failure: Exception) -> None:
            self.failure = failure

        def make_shard(self, shard: int, tick: Any) -> None:
            raise self.failure

    said: list[Any] = []
    serve_shard(Failing(OSError("disk\nmore")), 3, lambda *what, **more: said.append((*what, more)))
    assert said == [("failed", 3, {"text": "OSError: disk"}), ("ready", {})]
    said.clear()
    with pytest.raises(SystemExit):
        serve_shard(Failing(RuntimeError("CUDA error")), 3, lambda *what, **more: said.append((*what, more)))
    assert said == [("failed", 3, {"text": "RuntimeError: CUDA error"})]
    assert capsys.readouterr().err.count("Traceback") == 2


def test_a_device_that_cannot_start_leaves_the_work_to_the_others(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken device is tried three times and given up, by one event that names it; the good one makes all shards."""
    from boomgen.engines.local import LocalEngine

    run, python = plan_tiny(tmp_path / "run", **LONG), tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *broken*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    events = list(LocalEngine(run, ["broken", "cpu"]).run(range(13)))
    assert sorted(event.shard for event in events if event.kind == "done") == list(range(13))
    (gone,) = [event for event in events if event.kind == "gone"]
    assert gone.text == f"worker 0 (broken) dies while starting; see {run.logs}/worker-000.log"
    assert not run.missing()


def test_a_worker_that_hangs_while_it_loads_is_given_up(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that does not answer: it says nothing, and has no shard that could be overdue."""
    from boomgen.engines import handout, local

    run, python = plan_tiny(tmp_path / "run"), tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(handout, "LOADING", 0.5)
    with pytest.raises(BoomgenError, match=rf"workers die while starting \(hung and was killed\); see {run.logs}"):
        list(local.LocalEngine(run, ["cpu"]).run(range(7)))


def test_workers_that_cannot_start(plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that die while starting are tried three times, then it is one line that names the log."""
    from boomgen.engines.local import LocalEngine

    run = plan_tiny(tmp_path / "run")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(BoomgenError, match=rf"workers die while starting \(died with exit code 1\); see {run.logs}"):
        list(LocalEngine(run, ["cpu"]).run(range(7)))
