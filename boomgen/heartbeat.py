"""What each worker says of itself, whichever engine started it: one small file in RUN/workers as long as it lives.

A word is for people and promises nothing: writing one fails no shard, and reading passes over what is none. It holds
durations alone, by the worker's own clock; how old it is, is measured by the disk's. So clocks need not agree.
"""

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

from boomgen.run import RunDir
from boomgen.untrusted import printable

EVERY = 1.0  # seconds between two words in the midst of a shard
SILENT = 10.0
"""Seconds, besides BATCHES of the longest batches so far, after which a worker that says nothing is taken for gone."""
BATCHES = 3
FIRST = 600.0  # seconds; as long as nobody knows how long a batch takes
LOST = "lost.log"
"""In RUN/logs: attempts of which no worker could tell, since it died."""


Seconds = Annotated[dict[Literal["read", "infer", "write"], NonNegativeFloat], Field(min_length=3)]
NONE: Seconds = {"read": 0.0, "infer": 0.0, "write": 0.0}


class Word(BaseModel):
    """What a worker says: of itself since it was ready, and of the shard in hand."""

    model_config = ConfigDict(allow_inf_nan=False)

    worker: int
    host: str
    pid: int
    device: str
    loading: bool = False  # it is not ready yet
    up: NonNegativeFloat = 0.0  # seconds since it was ready
    shards: NonNegativeInt = 0
    rows: NonNegativeInt = 0  # those of the shard in hand among them
    seconds: Seconds = NONE  # of the shards that it made
    batch: NonNegativeFloat = 0.0  # seconds of the longest one
    shard: int | None = None  # in hand
    held: NonNegativeFloat = 0.0  # seconds that it has been in hand
    made: NonNegativeInt = 0  # rows of it
    spent: Seconds = NONE  # seconds on it


class Heard(NamedTuple):
    """A word, and the seconds since. gone: its process has ended, or has been silent for too long."""

    word: Word
    silence: float
    gone: bool


class Telling:
    """A worker that leaves word of itself: while `load` makes it, with every shard, and at most once a second in the
    midst of one."""

    def __init__(self, run: RunDir, device: str, number: int, load: Callable[[], Any]) -> None:
        host, folder = socket.gethostname(), run.workers
        self.path = folder / f"{number:03d}-{re.sub(r'[^a-zA-Z0-9.-]', '_', host)}-{os.getpid()}.json"
        self.start = self.told = time.monotonic()
        self.word = Word(worker=number, host=host, pid=os.getpid(), device=_device(device))
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
        self._tell(loading=True)
        try:
            self.worker = load()
        except BaseException:
            self.close()
            with contextlib.suppress(OSError):  # others are there
                folder.rmdir()
            raise
        self.start = time.monotonic()
        self._tell()

    def make_shard(self, shard: int, tick: Callable[[int], None]) -> dict[str, Any]:
        """As `Worker` does it."""
        idle, begun = self.word, time.monotonic()
        heard, made = begun, 0
        self._tell(shard=shard)

        def told(rows: int) -> None:
            nonlocal heard, made
            now, made = time.monotonic(), made + rows
            idle.batch, heard = max(idle.batch, round(now - heard, 3)), now
            if now - self.told >= EVERY:
                spent = _rounded(self.worker.spent)
                self._tell(shard=shard, held=round(now - begun, 3), made=made, rows=idle.rows + made, spent=spent)
            tick(rows)

        try:
            record: dict[str, Any] = self.worker.make_shard(shard, told)
            idle.shards, idle.rows = idle.shards + 1, idle.rows + record["rows"]
            idle.seconds = _rounded({name: idle.seconds[name] + record["seconds"][name] for name in NONE})
            return record
        finally:  # what was made of a shard that failed is made again
            self._tell()

    def _tell(self, **more: Any) -> None:
        self.told = time.monotonic()
        word = self.word.model_copy(update={"up": round(self.told - self.start, 3), **more})
        with contextlib.suppress(OSError):
            partial = self.path.with_name(f".{self.path.name}")
            partial.write_text(word.model_dump_json(), encoding="utf-8")
            partial.replace(self.path)

    def close(self) -> None:
        """It has ended, and says nothing any more."""
        for path in (self.path, self.path.with_name(f".{self.path.name}")):
            with contextlib.suppress(OSError):
                path.unlink()


def _device(device: str) -> str:
    """With the one GPU that the process sees, if it sees one."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"{device}:{shown}" if device == "cuda" and shown else device


def _rounded(seconds: dict[Any, float]) -> Seconds:
    return {name: round(seconds[name], 3) for name in NONE}


def words(run: RunDir) -> list[Heard]:
    """The last word of every worker that has not ended in good order."""
    return [heard for _, heard in _words(run)]


def _words(run: RunDir) -> list[tuple[Path, Heard]]:
    found: list[tuple[Path, float, Word]] = []
    for path in sorted(run.workers.glob("[0-9]*.json")):
        with contextlib.suppress(OSError, ValidationError):  # it has ended meanwhile, or is no word
            found.append((path, path.stat().st_mtime, Word.model_validate_json(path.read_bytes())))
    if not found:
        return []
    now, longest = _now(run.workers), max(word.batch for *_, word in found)
    limit = SILENT + BATCHES * longest if longest else FIRST
    ages = [(path, max(0.0, now - stamp), word) for path, stamp, word in found]
    return [(path, Heard(word, round(age, 3), age > limit or _ended(word))) for path, age, word in ages]


def _now(folder: Path) -> float:
    """The time by the clock of the folder's disk; by this machine's own, where nothing may be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _ended(word: Word) -> bool:
    """Whether it was a process of this machine, and is none any more."""
    try:
        if word.host == socket.gethostname() and word.pid > 0:
            os.kill(word.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's
        pass
    return False


def forget(run: RunDir, number: int) -> None:
    """A worker was killed, and its driver says so itself."""
    for path in run.workers.glob(f"{number:03d}-*.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def bury(run: RunDir) -> None:
    """Write down, for `boomgen logs`, which shards were in the hands of workers that died, and forget those."""
    missing = set(run.missing()) if run.workers.is_dir() else set()
    for path, heard in _words(run):
        if heard.gone:
            with contextlib.suppress(OSError):  # of several that look, one writes it down
                path.unlink()
                if heard.word.shard in missing:
                    note(run, epitaph(heard))


def epitaph(heard: Heard) -> str:
    """What became of a worker that is gone."""
    word = heard.word
    where = f"worker {word.worker} (process {word.pid} of {word.host})"
    return f"shard {word.shard} lost: {where} has not been heard of for {heard.silence:.0f} s"


def note(run: RunDir, text: str) -> None:
    """Add to RUN/logs what no worker could say."""
    append(run.logs / LOST, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def append(log: Path, text: str) -> None:
    """Add to a log. On a full disk the work counts, not the talk about it."""
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        print(printable(text), file=file)
