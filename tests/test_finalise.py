"""Closing a run: once or often, whole or not at all, whatever kills it; and what `--linkage none` destroys."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boomgen import finalise as closing
from boomgen import shard
from boomgen.cli import main
from boomgen.errors import BoomgenError
from boomgen.finalise import finalise
from boomgen.manifest import LINK_COLUMNS
from boomgen.run import RunDir, ranges
from boomgen.shard import DONE, PART
from boomgen.verify import verify

from .conftest import PlanTiny, Tell
from .finished import PEOPLE, make_shards, nan_model, write_portraits

Tree = dict[str, bytes]
PRIVATE, NONE = "private", "none"


def tree(run: Path) -> Tree:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(plan_tiny: PlanTiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by linkage whose shards are all whole: made from named portraits, not closed, with what workers leave."""
    folder = tmp_path_factory.mktemp("whole")
    portraits = write_portraits(folder / "portraits")
    runs = {}
    for linkage in (PRIVATE, NONE):
        run = plan_tiny(folder / linkage, dataset=str(portraits), linkage=linkage)
        make_shards(run)
        shutil.copytree(run.shard(0), run.staging / "00000-abandoned")
        run.logs.mkdir()
        (run.logs / "worker-000.log").write_text(f"shard 0 failed on {PEOPLE[0]}\n")
        runs[linkage] = run.path
    return runs


@pytest.fixture
def closable(whole: dict[str, Path], tmp_path: Path) -> Any:
    """A fresh copy of one of them."""
    numbers = itertools.count()

    def copy(linkage: str = PRIVATE) -> RunDir:
        return RunDir(shutil.copytree(whole[linkage], tmp_path / f"run{next(numbers)}"))

    return copy


def links(run: Path) -> Iterator[str]:
    """Everything on the disk that ties an output to a source."""
    yield from (name for name in ("secret", "index.parquet") if (run / name).exists())
    yield from (name for name in ("staging", "logs") if any(path.is_file() for path in (run / name).rglob("*")))
    for path in run.rglob("*"):
        if path.suffix == ".parquet" and set(pq.read_schema(path).names) & set(LINK_COLUMNS):
            yield str(path)
        if path.is_file() and any(person.encode() in path.read_bytes() for person in PEOPLE):
            yield str(path)


@pytest.mark.parametrize("linkage", [PRIVATE, NONE])
def test_closing_again_changes_nothing(closable: Any, linkage: str) -> None:
    """A closed run that is closed again keeps every file: content, inode, time."""
    run = closable(linkage)
    finalise(run)
    assert not list(verify(RunDir(run.path)))
    assert not run.staging.exists()

    def state() -> dict[Path, tuple[int, int, bytes]]:
        files = (path for path in run.path.rglob("*") if path.is_file())
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    finalise(RunDir(run.path))
    assert main(["finalise", str(run.path)]) == 0
    assert state() == before


def test_stopped_in_good_order(
    closable: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command given again closes the run."""
    run = closable()
    with monkeypatch.context() as patched:
        patched.setattr("boomgen.finalise._record", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["finalise", str(run.path)]) == 75
    assert "boomgen: stopped (SIGTERM); what is whole stays, go on with: boomgen resume" in capsys.readouterr().err
    assert main(["finalise", str(run.path)]) == 0
    assert not list(verify(RunDir(run.path)))


def test_tars_are_not_copied(closable: Any) -> None:
    """The data set's tars and the manifest's parts are the shards' own files."""
    run = closable()
    finalise(run)
    tars = sorted((run.dataset / "data").iterdir())
    for number, path in zip(range(run.plan.shards), tars, strict=True):
        assert path.samefile(run.shard(number) / "data.tar")
        assert (run.manifest / f"part-{number:05d}.parquet").samefile(run.shard(number) / PART)


def test_copies_where_links_cannot_be(closable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system refuses hard links, for whatever reason it gives, copies take their place."""
    linked = closable()
    finalise(linked)
    for code in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):

        def refuse(*_: Any, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", refuse)
        run = closable()
        finalise(run)
        assert tree(run.path) == tree(linked.path)
        assert not list(verify(RunDir(run.path)))


def killed(run: Path, moment: int) -> bool:
    """Whether a finalise in a process of its own, SIGKILLed before its `moment`-th change on the disk, was killed."""
    child = os.fork()
    if child == 0:
        changes, home = itertools.count(), str(run)

        def watch(event: str, args: tuple[Any, ...]) -> None:
            makes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
            writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax")
            relative = len(args) > 1 and args[-1] not in (-1, None) and event in ("os.remove", "os.rmdir")
            if (makes or writes) and (relative or str(args[0]).startswith(home)) and next(changes) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        finalise(RunDir(run))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("linkage", [PRIVATE, NONE])
def test_killed_before_every_change(closable: Any, linkage: str, monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    """Killed before any of its changes on the disk: a data set that is there is whole, its manifest too, and with
    `--linkage none` nothing links any more; going on gives the same files as an undisturbed run."""
    monkeypatch.setattr(shard, "sync", lambda path: None)  # nothing that a reader could see
    monkeypatch.setattr(closing, "sync", lambda path: None)
    finalise(undisturbed := closable(linkage))
    expected = tree(undisturbed.path)
    for moment in itertools.count():
        run = closable(linkage)
        if not killed(run.path, moment):
            break
        found = tree(run.path)
        status = RunDir(run.path).status()
        assert (status.whole, status.missing) == (run.plan.shards, [])
        if status.finalised:
            assert {name: found[name] for name in expected} == expected
            assert linkage == PRIVATE or not list(links(run.path))
        finalise(RunDir(run.path))
        assert tree(run.path) == expected
        shutil.rmtree(run.path)
    assert moment > 20
    assert (linkage == NONE) == (not list(links(undisturbed.path)))
    tell(f"{linkage}: finalise killed before each of its {moment} changes")


def test_links_are_seen(whole: dict[str, Path]) -> None:
    """What the check for links must find, it finds in a run that is not closed."""
    found = set(links(whole[NONE]))
    assert {"secret", "index.parquet", "staging", "logs", str(whole[NONE] / "logs" / "worker-000.log")} < found
    assert str(whole[NONE] / "shards" / "00000" / PART) in found


def test_two_at_once(closable: Any) -> None:
    """Four processes that close one run at the same time all succeed, and the run is sound."""
    start = multiprocessing.get_context("fork")
    for _ in range(5):
        run = closable()
        line = start.Barrier(4)

        def close(path: Path = run.path, line: Any = line) -> None:
            line.wait()
            finalise(RunDir(path))

        closers = [start.Process(target=close) for _ in range(4)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()
        assert [closer.exitcode for closer in closers] == [0] * 4
        assert not list(verify(RunDir(run.path)))
        assert not run.staging.exists()


def test_missing_shards_are_named(closable: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Missing shards are told as ranges, with the command that makes them; nothing is closed."""
    run = closable()
    shutil.rmtree(run.shard(1))
    assert main(["finalise", str(run.path)]) == 1
    expected = f"boomgen: 1 of 2 shards are missing (1); go on with: boomgen resume {run.path}\n"
    assert capsys.readouterr().err == expected
    shutil.rmtree(run.shard(0))
    with pytest.raises(BoomgenError, match=r"2 of 2 shards are missing \(0-1\)"):
        finalise(RunDir(run.path))
    assert not run.dataset.exists()
    assert not run.manifest.exists()


@pytest.mark.parametrize("linkage", [PRIVATE, NONE])
def test_no_ok_row_is_an_error(
    plan_tiny: PlanTiny, tiny_model: Path, tmp_path: Path, linkage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without one ok row is not closed, and keeps its secret and links."""
    broken = nan_model(tiny_model, tmp_path / "nan", slice(None))
    run = plan_tiny(tmp_path / "run", model=str(broken), linkage=linkage, limit=20)
    make_shards(run)
    before = tree(run.path)
    assert main(["finalise", str(run.path)]) == 1
    assert "not one of 20 rows is ok" in capsys.readouterr().err
    assert tree(run.path) == before
    assert run.status().failed == {"nan": 20}


def test_shards_without_ok_rows_have_no_tar(plan_tiny: PlanTiny, tiny_model: Path, tmp_path: Path) -> None:
    """The data set's tars are numbered without gaps over the shards that hold rows; the manifest has all parts."""
    run = plan_tiny(tmp_path / "run", model=str(nan_model(tiny_model, tmp_path / "nan", slice(5))), shard_size=2)
    finalise(make_shards(run))
    ok = [run.done(number)["ok"] for number in range(run.plan.shards)]
    held = [count for count in ok if count]
    assert 0 < len(held) < len(ok) == 50
    assert sum(ok) == 50
    names = [f"train-{i:05d}-of-{len(held):05d}.tar" for i in range(len(held))]
    assert sorted(path.name for path in (run.dataset / "data").iterdir()) == names
    assert len(list(run.manifest.iterdir())) == 50
    assert not list(verify(RunDir(run.path)))


def test_damage_is_not_taken_over(closable: Any) -> None:
    """With `--linkage none` a damaged part is an error, before and after closing; its record is left as it was."""
    for close_first in (False, True):
        run = closable(NONE)
        if close_first:
            finalise(run)
        part = run.shard(0) / PART
        record = (run.shard(0) / DONE).read_bytes()
        data = part.read_bytes()
        part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        with pytest.raises(BoomgenError, match=f"{part} differs from its done record"):
            finalise(RunDir(run.path))
        assert (run.shard(0) / DONE).read_bytes() == record
        (run.shard(0) / f".{PART}").write_bytes(data[:50])  # as a kill in the middle of writing leaves it
        with pytest.raises(BoomgenError, match=f"{part} differs from its done record"):
            finalise(RunDir(run.path))
        part.unlink()
        with pytest.raises(BoomgenError, match=f"{part} differs from its done record"):
            finalise(RunDir(run.path))


@given(st.sets(st.integers(0, 60)))
def test_ranges_closed_form(numbers: set[int]) -> None:
    """Written ranges hold exactly the numbers, ascending, and no two could be one."""
    text = ranges(sorted(numbers))
    ends = [tuple(map(int, part.split("-"))) for part in text.split(",") if part]
    assert [n for part in ends for n in range(part[0], part[-1] + 1)] == sorted(numbers)
    assert all(first[-1] + 1 < second[0] for first, second in itertools.pairwise(ends))
    assert all(len(part) == 1 or part[0] < part[1] for part in ends)


def test_ranges_as_written() -> None:
    """As schedulers read them."""
    assert ranges([0, 1, 2, 3, 7, 9, 10]) == "0-3,7,9-10"
    assert ranges([]) == ""
