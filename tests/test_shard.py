"""The publish protocol: a shard is whole or absent whatever two workers and kills do, and its bytes are stable."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from boomgen import shard
from boomgen.shard import DONE, FAILPOINTS, PART, TAR, ShardWriter, canonical, sealed, sha256_file, unseal

from .conftest import Tell

Files = dict[str, bytes]
STEPS = len(FAILPOINTS)  # with one row a worker passes each of them once


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(run: Path, mark: str) -> bool:
    """A worker's whole attempt at shard 3. Every worker's files differ, so that a mixture would show."""
    run.mkdir(exist_ok=True)
    writer = ShardWriter(run / "shards", run / "staging", 3)
    writer.row(f"row-{mark}", {"png": mark.encode() * 700, "json": b"{}"})
    writer.seal(pa.table({"key": [f"row-{mark}"]}), {"made by": mark})
    return writer.publish()


def written(run: Path, mark: str) -> Files:
    """The files of an undisturbed attempt, checked: all three, hashes as in the record, the tar holds its row."""
    assert write(run, mark)
    folder = run / "shards" / "00003"
    record = unseal((folder / DONE).read_bytes())
    assert record["shard"] == 3
    assert record["made by"] == mark
    assert record["files"] == {
        name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in (TAR, PART)
    }
    with tarfile.open(folder / TAR) as tar:
        assert tar.getnames() == [f"row-{mark}.json", f"row-{mark}.png"]
    assert pq.read_table(folder / PART).column("key").to_pylist() == [f"row-{mark}"]
    assert contents(folder).keys() == {TAR, PART, DONE}
    return contents(folder)


def stepped(run: Path, mark: str) -> Iterator[str]:
    """`write` in steps, from failpoint to failpoint."""
    writer = ShardWriter(run / "shards", run / "staging", 3)
    yield "staged"
    writer.row(f"row-{mark}", {"png": mark.encode() * 700, "json": b"{}"})
    yield "row-written"
    yield from writer.sealing(pa.table({"key": [f"row-{mark}"]}), {"made by": mark})
    writer.publish()
    yield "published"


def schedules(steps: int) -> Iterator[tuple[int, ...]]:
    """Every order in which workers 0 and 1 take i and j steps, for all i, j <= steps; who stops short is killed.

    Worker 0 begins: the other half are mirror images.
    """
    for i, j in itertools.product(range(steps + 1), repeat=2):
        for ones in itertools.combinations(range(i + j), j):
            if 0 not in ones:
                yield tuple(int(at in ones) for at in range(i + j))


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: the same system calls, a hundred thousand files in seconds."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_interleavings(quick_disk: Path, monkeypatch: pytest.MonkeyPatch, tell: Tell) -> None:
    """After every step of every interleaving of two workers, with either or both killed after any step, the shard is
    absent or one worker's three files, never to change again; one more worker then leaves exactly one whole shard.
    """
    monkeypatch.setattr(shard, "sync", lambda path: None)  # nothing that another process could see
    whole = {mark: written(quick_disk / mark, mark) for mark in "ABC"}
    assert all(len({files[name] for files in whole.values()}) == 3 for name in (TAR, PART, DONE))
    run, count, steps, races = quick_disk / "run", 0, 0, 0
    final = run / "shards" / "00003"
    for schedule in schedules(STEPS):
        run.mkdir()
        workers = [stepped(run, mark) for mark in "AB"]
        seen: Files | None = None
        for who in schedule:
            next(workers[who])
            found = contents(final) if final.exists() else None
            assert found in (None, whole["A"], whole["B"]), f"mixed or partial at {schedule}"
            assert seen in (None, found), f"a published shard changed at {schedule}"
            seen = found
        assert (seen is not None) == any(schedule.count(who) == STEPS for who in (0, 1))
        assert write(run, "C") == (seen is None)
        assert contents(final) == (seen or whole["C"])
        assert [path.name for path in final.parent.iterdir()] == ["00003"]
        count, steps, races = count + 1, steps + len(schedule), races + (len(schedule) == 2 * STEPS)
        shutil.rmtree(run)
    assert list(stepped(quick_disk, "A")) == list(FAILPOINTS)
    assert (2 * count, 2 * races) == (math.comb(2 * STEPS + 2, STEPS + 1), math.comb(2 * STEPS, STEPS))
    tell(f"{count} interleavings of two workers, {steps} steps, each checked")


def test_processes_race(tmp_path: Path) -> None:
    """Eight processes publish one shard at once, ten times: one wins each time, and the losers leave nothing."""
    start = multiprocessing.get_context("fork")
    for turn in range(10):
        run, results = tmp_path / str(turn), start.SimpleQueue()
        line = start.Barrier(8)

        def work(mark: str, run: Path = run, line: Any = line, results: Any = results) -> None:
            writer = ShardWriter(run / "shards", run / "staging", 3)
            writer.row(f"row-{mark}", {"png": mark.encode()})
            writer.seal(pa.table({"key": [mark]}), {"made by": mark})
            line.wait()
            results.put((mark, writer.publish()))

        run.mkdir()
        workers = [start.Process(target=work, args=(mark,)) for mark in "ABCDEFGH"]
        for worker in workers:
            worker.start()
        ended = dict(results.get() for _ in workers)
        for worker in workers:
            worker.join()
        (winner,) = (mark for mark, won in ended.items() if won)
        folder = run / "shards" / "00003"
        record = unseal((folder / DONE).read_bytes())
        assert record["made by"] == winner
        assert all(sha256_file(folder / name) == known["sha256"] for name, known in record["files"].items())
        assert list((run / "staging").iterdir()) == []


def test_abandoned_leaves_nothing(tmp_path: Path) -> None:
    """An abandoned attempt is gone, also when abandoned twice or after its folder was removed."""
    writer = ShardWriter(tmp_path / "shards", tmp_path / "staging", 3)
    writer.row("a", {"png": b"x"})
    writer.abandon()
    writer.abandon()
    assert list((tmp_path / "staging").iterdir()) == list((tmp_path / "shards").iterdir()) == []


def test_abandoned_on_a_full_disk(tmp_path: Path) -> None:
    """A file that can take no more (here: of a limited size) fails when it is closed too; the attempt is gone all the
    same, or it would keep the space that later shards need."""

    def fill(writer: ShardWriter) -> None:
        for number in range(100):  # small rows, so that some are still in the file's buffer when the disk is full
            writer.row(str(number), {"png": bytes(1000)})

    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        writer = ShardWriter(tmp_path / "shards", tmp_path / "staging", 3)
        with pytest.raises(OSError, match="File too large"):
            fill(writer)
        writer.abandon()

    child = multiprocessing.get_context("fork").Process(target=attempt)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert list((tmp_path / "staging").iterdir()) == []


def test_stopped_while_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that stops a worker while it opens an attempt, when nobody can abandon it yet, leaves nothing."""

    def stop(name: str, number: int) -> None:
        raise SystemExit(75)

    monkeypatch.setattr(shard, "failpoint", stop)
    with pytest.raises(SystemExit):
        ShardWriter(tmp_path / "shards", tmp_path / "staging", 3)
    assert list((tmp_path / "staging").iterdir()) == []


def test_disk_error_on_publish_is_raised(tmp_path: Path) -> None:
    """A name that is taken by a file is an error of the disk, not a lost race."""
    writer = ShardWriter(tmp_path / "shards", tmp_path / "staging", 3)
    writer.seal(pa.table({"key": ["a"]}), {})
    (tmp_path / "shards" / "00003").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        writer.publish()


def test_tar_is_stable(tmp_path: Path) -> None:
    """The same rows give the same tar, whatever the time, the user's umask and the order of a sample's members."""
    hashes = set()
    for turn, mask, order in ((0, 0o022, 1), (1, 0o077, -1)):
        before = os.umask(mask)
        try:
            writer = ShardWriter(tmp_path / f"shards{turn}", tmp_path / "staging", 0)
            for key in ("b", "a"):
                writer.row(key, dict([("png", key.encode() * 999), ("json", b"{}"), ("cls", b"1")][::order]))
            writer.seal(pa.table({"key": ["b", "a"]}), {})
            writer.publish()
        finally:
            os.umask(before)
        hashes.add(sha256_file(tmp_path / f"shards{turn}" / "00000" / TAR))
    assert hashes == {"ab25808086e3ba05e527bfd9c0956633e0482229f593f907aabdc707599eab34"}
    with tarfile.open(tmp_path / "shards0" / "00000" / TAR) as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == ["b.cls", "b.json", "b.png", "a.cls", "a.json", "a.png"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
    assert members[2].size == 999


def test_sealed_refuses_every_flip() -> None:
    """Any one bit of a sealed record flipped, any byte dropped, doubled or added: refused."""
    record = {"rows": 3, "seconds": 0.1, "name": "é", "none": None, "list": [1, {"a": True}], "sha256": "ignored"}
    data = sealed(record)
    body = {name: value for name, value in record.items() if name != "sha256"}
    assert unseal(data) == body | {"sha256": hashlib.sha256(canonical(body)).hexdigest()}
    damaged = [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]
    damaged += [data[:i] + data[i + 1 :] for i in range(len(data))]
    damaged += [data[: i + 1] + data[i:] for i in range(len(data))]
    damaged += [
        b"",
        data[:-1],
        data + b"\n",
        json.dumps(json.loads(data)).encode(),
        b"[]",
        b"3",
        b"{}",
        b"\xff",
        b"[" * 99_999,
    ]
    for wrong in damaged:
        with pytest.raises(ValueError):
            unseal(wrong)
    assert len(damaged) > 8 * len(data)


@pytest.mark.parametrize(("moment", "left"), [(0, b"old"), (1, b"new"), (2, b"new")])
def test_write_durable_is_whole_or_absent(tmp_path: Path, moment: int, left: bytes) -> None:
    """Killed before the file is synced, after its rename, and not at all: one content or the other, never a part."""
    path = tmp_path / "secret"
    shard.write_durable(path, b"old" * 1000)
    real_sync, calls = shard.sync, itertools.count()

    def sync(target: Path) -> None:
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        real_sync(target)

    child = os.fork()
    if child == 0:
        shard.sync = sync
        shard.write_durable(path, b"new" * 1000)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if moment == 2 else -signal.SIGKILL)
    assert path.read_bytes() == left * 1000


def test_write_durable_fails_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails leaves the old file, and no partial one."""
    path = tmp_path / "secret"
    shard.write_durable(path, b"old")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard, "sync", full)
    with pytest.raises(OSError, match="No space"):
        shard.write_durable(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("secret", b"old")]


def test_readers_see_whole_files(tmp_path: Path) -> None:
    """While a file is written again and again, a reader sees one content or the other."""
    path, texts = tmp_path / "plan.json", [b"a" * 300_000, b"b" * 200_000]
    shard.write_durable(path, texts[0])
    seen, over = set(), threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(60):
        shard.write_durable(path, texts[turn % 2])
    over.set()
    reader.join()
    assert seen <= set(texts)
    assert seen
