"""How far a run is: from whole shards and what workers say of themselves, whatever their clocks and engines."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from boomgen import heartbeat, progress, tell
from boomgen.cli import main
from boomgen.engines.handout import Event
from boomgen.engines.local import serve_shard
from boomgen.heartbeat import Telling, bury
from boomgen.progress import Look, line, look
from boomgen.run import RunDir, Status
from boomgen.worker import Worker

from .conftest import PlanTiny

MADE = Status(10, 4, [4, 5, 6, 7, 8, 9], 62, {"nan": 2}, False, {"read": 4, "infer": 90, "write": 6, "total": 95}, 20)
HALF = {"read": 1.0, "infer": 5.0, "write": 0.0}
Say = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """10 shards of 16 rows: 4 whole, of 20 s each."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "logs").mkdir()
    made_up = {"status": lambda: MADE, "missing": lambda: MADE.missing, "plan": SimpleNamespace(rows=160)}
    return cast(RunDir, SimpleNamespace(path=tmp_path, workers=tmp_path / "workers", logs=tmp_path / "logs", **made_up))


@pytest.fixture
def say(run: RunDir) -> Say:
    """Write a worker's word, said so many seconds ago."""

    def write(worker: int, ago: float, host: str = "far", **more: Any) -> Path:
        path = run.workers / f"{worker:03d}-{host}-1.json"
        path.write_text(json.dumps({"worker": worker, "host": host, "pid": 2**30, "device": "cpu", "batch": 5, **more}))
        os.utime(path, (time.time() - ago,) * 2)
        return path

    return write


@pytest.fixture(params=["clocks agree", "an hour early", "an hour late", "may not write"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock beside the disk's."""
    early = {"an hour early": -3600.0, "an hour late": 3600.0}.get(request.param, 0.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(time=lambda: time.time() + early))
    if request.param == "may not write":

        def refused(dir: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(heartbeat.tempfile, "TemporaryFile", refused)


def states(found: Look) -> dict[int, str]:
    return {seen.word.worker: seen.state for seen in found.workers}


def test_a_look_counts_halves_and_names_who_straggles_or_is_silent(clock: None, run: RunDir, say: Say) -> None:
    """Three batches of 5 s and 10 s are the longest silence. Of a shard in two hands the greater half counts; what a
    dead worker had counts no more, and once somebody else makes it, nobody speaks of it."""
    say(0, ago=2, shard=4, held=6, made=8, rows=40, up=100, spent=HALF)
    say(1, ago=20, shard=5, held=21, made=8, rows=20, up=100)  # 41 s are more than twice the usual 20
    say(2, ago=24, shard=5, held=1, made=4, rows=30, up=100)
    say(3, ago=90, shard=6, held=1, made=8, rows=20, up=100)
    say(4, ago=90, shard=4, held=1, made=8)
    say(5, ago=20)
    say(6, ago=1, rows=16, up=16)
    say(7, ago=1, shard=0, made=8, rows=16, up=16)  # whole, by somebody else
    found = look(run)
    expected = ["busy", "straggling", "busy", "silent", None, "idle", "idle", "busy"]
    assert states(found) == {number: state for number, state in enumerate(expected) if state}
    assert found.made == 64 + 8 + 8
    assert found.rate == pytest.approx(0.4 + 0.2 + 0.3 + 1 + 1)  # the idle one of a second ago is between two shards
    assert found.left == pytest.approx(80 / 2.9, abs=0.1)
    assert found.seconds == {"read": 5, "infer": 95, "write": 6, "total": 95}
    assert found.workers[0].held == pytest.approx(8, abs=1)
    told = found.json()
    assert told["missing"] == "4-9"
    assert re.sub(r"\d\d s(?=[,)]|$)", "N s", line(found)) == (
        "80/160 images, 2.9 images/s, 28 s left, 2 failed, worker 1 of far: shard 5 for N s, straggles (usual: N s), "
        "worker 3 of far: silent for N s, had shard 6, 4 at work (0.2 to 1.0 images/s), read 5 s, infer N s, write 6 s"
    )
    assert told["workers"][3] | {"silence": 90} == {
        **{"worker": 3, "host": "far", "pid": 2**30, "device": "cpu", "batch": 5, "up": 100, "shards": 0},
        **{"loading": False},
        **{"shard": 6, "made": 8, "rows": 20, "state": "silent", "rate": 0.2, "silence": 90},
        **{"seconds": heartbeat.NONE, "spent": heartbeat.NONE, "held": told["workers"][3]["held"]},
    }


def test_what_is_no_word_is_passed_over(run: RunDir, say: Say) -> None:
    """Half-written, of another form, or hostile; without a worker nobody knows when the run ends."""
    for number, text in enumerate(["", "{", "[]", '{"worker": 1e999}', "[" * 10**5, '{"worker": 3}']):
        (run.workers / f"00{number}-x-1.json").write_text(text)
    say(7, ago=0, seconds={"read": 1})
    say(8, ago=0, up=float("inf"))
    assert look(run).workers == []
    assert look(run).left is None
    assert line(look(run)) == "64/160 images, 2 failed, nobody at work, read 4 s, infer 90 s, write 6 s"


def test_the_first_batch_may_take_long(run: RunDir, say: Say) -> None:
    say(0, ago=500, shard=4, batch=0)
    say(1, ago=700, shard=5, batch=0)
    assert states(look(run)) == {0: "straggling", 1: "silent"}


class Made:
    """Stands in for a worker, whose shards take three batches of a second."""

    device, spent = "cpu", HALF

    def __init__(self, run: RunDir) -> None:
        self.run, self.seen = run, list[dict[str, Any]]()

    def make_shard(self, shard: int, tick: Callable[[int], None]) -> dict[str, Any]:
        for _ in range(3):
            tick(8)
            self.seen += [json.loads(path.read_text()) for path in self.run.workers.glob("*.json")]
        if shard == 9:
            raise OSError(5, "Input/output error")
        return {"rows": 24, "ok": 24, "seconds": HALF | {"total": 6.0}}


def test_a_worker_says_how_far_it_is(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every tick; what it made of a shard that failed is taken back; in the end nothing is left of it."""
    now = iter(range(10**6))
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: next(now) * 0.4))
    made = Made(run)
    worker = Telling(run, "cpu", 3, lambda: made)
    worker.make_shard(0, lambda rows: None)
    assert [(word["shard"], word["made"], word["rows"]) for word in made.seen] == [(0, 0, 0), (0, 0, 0), (0, 24, 24)]
    assert made.seen[2]["spent"] == HALF
    with pytest.raises(OSError, match="Input/output"):
        worker.make_shard(9, lambda rows: None)
    (said,) = heartbeat.words(run)
    assert (said.word.shards, said.word.rows, said.word.seconds, said.word.shard) == (1, 24, HALF, None)
    assert not said.gone
    worker.close()
    assert list(run.workers.iterdir()) == []


def test_a_worker_is_seen_while_it_loads(run: RunDir) -> None:
    """And no more, where it cannot."""

    def load() -> Made:
        (seen,) = look(run).workers
        assert (seen.state, seen.rate) == ("loading", 0)
        assert line(look(run)).endswith(" 1 loading, read 4 s, infer 90 s, write 6 s")
        return Made(run)

    Telling(run, "cpu", 0, load).close()
    with pytest.raises(ZeroDivisionError):
        Telling(run, "cpu", 0, lambda: 1 / 0)
    assert not run.workers.exists()
    assert ", nobody at work, " in line(look(run))


def test_a_word_that_cannot_be_written_fails_no_shard(run: RunDir) -> None:
    run.workers.rmdir()
    run.workers.write_text("in the way")
    worker = Telling(run, "cpu", 0, lambda: Made(run))
    assert worker.make_shard(1, lambda rows: None)["ok"] == 24
    worker.close()


def test_dead_workers_are_written_down_once(
    run: RunDir, say: Say, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of this machine at once, one of another after its silence; of whole shards nobody needs to hear."""
    here = heartbeat.socket.gethostname()
    paths = [say(0, 1, here, shard=4), say(1, 90, shard=5), say(2, 90, shard=0), say(3, 90), say(4, 1, shard=6)]
    where = f"worker 0 (process {2**30} of {here}) has not been heard of for 1 s"
    assert next(tell.log_lines(cast(RunDir, SimpleNamespace(**vars(run), failures=list)), failed=True)) == (
        f"shard 4 lost: {where}"
    )
    for _ in range(2):
        bury(run)
    assert [path.exists() for path in paths] == [False, False, False, False, True]
    progress.note(run, "shard 7 lost: worker 1 died with exit code -9")
    (run.logs / "worker-000.log").write_text("2026-01-01 10:00:00 shard 1 done: 16 of 16 rows, s: read 0.00\n")
    _serve_shard_that_fails(run)
    (run.logs / "slurm-7_1.log").write_text(
        "part 1/4 on node1, start 1\nworker 1 of 4: 2 shards on cuda\npart 1/4: 2 of 2 shards whole\n"
        "boomgen: stopped (SIGUSR1); what is whole stays, go on with: boomgen resume r\n"
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n"
    )
    told = list(tell.log_lines(cast(RunDir, SimpleNamespace(**vars(run), failures=list)), failed=True))
    stamp = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
    assert [stamp.sub("TIME", said) for said in told] == [
        f"lost: TIME shard 4 lost: {where}",
        f"lost: TIME shard 5 lost: worker 1 (process {2**30} of far) has not been heard of for 90 s",
        "lost: TIME shard 7 lost: worker 1 died with exit code -9",
        "slurm-7_1: slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.",
        "worker-000: TIME shard 9 failed: OSError: [Errno 5] Input/output error",
    ]


def _serve_shard_that_fails(run: RunDir) -> None:
    with (run.logs / "worker-000.log").open("a") as log, pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.stderr", log)
        serve_shard(Made(run), 9, lambda *told, **more: None)


def test_the_driver_tells_of_a_run_and_its_events(
    run: RunDir, say: Say, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line now and then, one at the end where something was made; a name may not speak to the terminal."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    run.published = lambda: set(range(4))  # type: ignore[method-assign]
    say(0, ago=0, host="\x1b[2J", shard=4, held=60, rows=16, up=8)

    def events() -> Iterator[Event]:
        yield Event("failed", 4, "OSError: \x1b[2J")
        yield Event("lost", 5, "worker 1 died with exit code -9")
        yield Event("gone", -1, "worker 2 (cpu) dies while starting; see LOG")
        time.sleep(0.2)

    progress.show(run, events())
    first, second, third, *lines = capsys.readouterr().err.splitlines()
    assert first == "shard 4: OSError: \\x1b[2J"
    assert second == "shard 5: worker 1 died with exit code -9"
    assert third == "worker 2 (cpu) dies while starting; see LOG; the others go on"
    assert 1 <= len(lines) <= 4
    ill = "worker 0 of \\x1b[2J: shard 4 for 60 s, straggles (usual: 20 s)"
    assert lines[-1].startswith(
        f"64/160 images, 2.0 images/s, 48 s left, 2 failed, {ill}, 1 at work (2.0 to 2.0 images/s)"
    )
    noted = [line.split(" ", 2)[2] for line in (run.logs / "lost.log").read_text().splitlines()]
    assert noted == [
        "shard 5 lost: worker 1 died with exit code -9",
        "worker 2 (cpu) dies while starting; see LOG",
    ]


def test_the_bar_ends_although_a_look_does_not(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a store does not answer: who stops a run waits for its exit code, not for that."""
    answered, asked = threading.Event(), threading.Event()
    monkeypatch.setattr(progress, "LAST_LOOK", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)

    def late(run: RunDir) -> Look:
        asked.set()
        answered.wait()
        raise OSError("no answer")

    monkeypatch.setattr(progress, "look", late)
    run.published = set  # type: ignore[method-assign]
    with progress.bar(run):
        assert asked.wait(60)
    answered.set()


def two_at_work(run: RunDir, capsys: pytest.CaptureFixture[str], pids: list[int]) -> bool:
    """Whether `status` sees two workers of a real run at work; if it does, what it says of them must hold."""
    capsys.readouterr()
    assert main(["status", str(run.path), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    workers = seen["workers"]
    if len(workers) < 2 or not all(worker["rate"] for worker in workers):
        return False
    assert 0 < seen["made"] < seen["rows"]
    assert seen["rate"] == pytest.approx(sum(worker["rate"] for worker in workers), abs=0.01)
    assert seen["left"] > 0
    assert [worker["worker"] for worker in workers] == [0, 1]
    assert {worker["pid"] for worker in workers} == set(pids)
    assert all(worker["seconds"]["infer"] + worker["spent"]["infer"] > 0 for worker in workers)
    return True


def test_a_watch_looks_until_all_is_whole_and_reads_each_record_once(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a look where there is no terminal, else one picture; Ctrl-C ends it, and is no stopped run."""
    run = plan_tiny(tmp_path / "run", limit=32)
    worker, read, turns = Worker(run), list[int](), list[float]()
    done = RunDir.done
    monkeypatch.setattr(RunDir, "done", lambda self, number: read.append(number) or done(self, number))

    def sleep(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) in (1, 4):
            raise KeyboardInterrupt
        worker.make_shard(len(turns) - 2)

    monkeypatch.setattr(tell, "time", SimpleNamespace(sleep=sleep))
    assert main(["status", str(run.path), "--watch"]) == 0
    assert main(["status", str(run.path), "--watch", "--json"]) == 0
    first, *looks = capsys.readouterr().out.splitlines()
    assert first == "0/32 images, nobody at work"
    assert [json.loads(text)["made"] for text in looks] == [0, 16, 32]
    assert read == [0, 1]
    assert turns == [2.0] * 3
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["status", str(run.path), "--watch"]) == 0
    assert capsys.readouterr().out.startswith("\x1b[H\x1b[Jrows    32 ok of 32\n")


def test_ctrl_c_in_the_midst_of_a_look_ends_the_watching_alone(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, looks = plan_tiny(tmp_path / "run", limit=32), list[Path]()

    def seen(run: RunDir) -> Look:
        looks.append(run.path)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return look(run)

    monkeypatch.setattr(progress, "look", seen)
    monkeypatch.setattr(tell, "WATCH_EVERY", 0.0)
    assert main(["status", str(run.path), "--watch"]) == 0
    assert capsys.readouterr().out == "0/32 images, nobody at work\n"
