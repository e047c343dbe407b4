"""Workers without a driver: accelerate, torchrun and srun start one process per device and tell it its rank.

Each makes its share of the shards, then what is left of the others'. No process talks to another: what is whole is
seen in the run folder, and what is in the making by a staging folder that changes.
"""

import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from boomgen import env
from boomgen.engines.handout import ATTEMPTS, set_aside
from boomgen.engines.local import gist, loaded, make_logged
from boomgen.errors import BoomgenError, UsageError
from boomgen.heartbeat import BATCHES, SILENT, append, bury, words
from boomgen.run import RunDir
from boomgen.untrusted import printable

LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate launch
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; a batch script itself is no step
)
LOOK_AGAIN = 1.0  # seconds
STALE = 0.1  # seconds, after which it is looked again who has what in hand: a thousand ranks have a thousand folders


class Rank(NamedTuple):
    """One of `world_size` processes; `local` counts those of this machine."""

    rank: int
    world_size: int
    local: int


def rank_of(environ: Mapping[str, str]) -> Rank | None:
    """This process's place among those that a launcher started together; None: it is alone.

    Raises:
        UsageError: a launcher says that there are several, and not which one this is.
    """
    for names in LAUNCHERS:
        values = [environ.get(name) for name in names]
        if values[1] in (None, "1"):
            continue
        if not all(value and value.isdecimal() for value in values) or int(str(values[0])) >= int(str(values[1])):
            told = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
            raise UsageError(
                f"{told}; expected {', '.join(names)}, the first below the second: without them, every process takes "
                "itself for the only one; start boomgen by torchrun, accelerate launch or srun, or unset them"
            )
        rank = Rank(*(int(str(value)) for value in values))
        bound = names[0].startswith("SLURM") and "," not in environ.get("CUDA_VISIBLE_DEVICES", ",")
        return rank._replace(local=0) if bound else rank  # srun may show each task a GPU of its own
    return None


def own(shards: Sequence[int], rank: Rank) -> list[int]:
    """A rank's part of these shards: of one plan always the same, whatever is whole already."""
    return [shard for shard in shards if shard % rank.world_size == rank.rank]


def others(shards: Sequence[int], rank: Rank) -> list[int]:
    """What is not a rank's own, from the end: its owners come from the beginning. Each rank helps another one first."""
    size = rank.world_size
    return sorted(
        (shard for shard in shards if shard % size != rank.rank), key=lambda s: (-(s // size), (s - rank.rank) % size)
    )


def part(text: str) -> Rank:
    """3/64 as one of 64 parts, counted from 0.

    Raises:
        UsageError: not of this form, or there is no such part.
    """
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UsageError(f"--part {text}; expected I/N, as 0/64 to 63/64")
    return Rank(int(first), int(count), 0)


def work(run: RunDir, shards: Sequence[int], rank: Rank, device: str, allow_mixed: bool = False) -> None:
    """Make these missing shards, its own first, but for those in another's hands; return when all are whole.

    Raises:
        BoomgenError: this device is not of the planned class, or, when all others are whole, shards failed ATTEMPTS
            times.
    """
    if not shards:
        return
    bury(run)
    run.logs.mkdir(exist_ok=True)
    mine, theirs = own(shards, rank), others(shards, rank)
    claimed = env.claim(f"cuda:{rank.local}" if device == "cuda" else device)
    with contextlib.closing(loaded(run, claimed, allow_mixed, rank.rank)) as worker:
        maker = _Maker(run, worker, rank.rank)
        print(f"worker {rank.rank} of {rank.world_size}: {len(mine)} shards on {device}", file=sys.stderr, flush=True)
        waiting = [shard for shard in mine if not maker.settled(shard)]
        todo = _left(run, waiting + theirs)
        while todo:
            waiting = [shard for shard in todo if not maker.settled(shard)]
            if waiting == todo:
                time.sleep(LOOK_AGAIN)
            todo = waiting
    while (failed := _left(run, list(maker.aside))) and theirs and _at_work(run):
        time.sleep(LOOK_AGAIN)  # others may make what failed here, and an error of one ends them all
    set_aside({shard: maker.aside[shard] for shard in failed}, run.path)


def _at_work(run: RunDir) -> bool:
    """Whether a worker has a shard in hand, or is about to."""
    heard = (each for each in words(run) if not each.gone)
    return any(each.word.shard is not None or each.word.loading or each.silence < SILENT for each in heard)


def _left(run: RunDir, shards: Sequence[int]) -> list[int]:
    """Those that are not whole, by one listing: of each rank, a request for each would be too many for a store."""
    whole = run.published() if shards else set[int]()
    return [shard for shard in shards if shard not in whole]


class _Maker:
    """Makes what is left to make, and counts what failed."""

    def __init__(self, run: RunDir, worker: Any, number: int) -> None:
        self.run, self.worker, self.others = run, worker, _Others(run)
        self.log = run.logs / f"worker-{number:03d}.log"
        self.failures, self.aside = Counter[int](), dict[int, str]()
        self._in_a_row, self._made = 0, False

    def settled(self, shard: int) -> bool:
        """Whether a shard is whole, perhaps made now, or set aside; if not, it is to be looked at again."""
        if shard in self.aside:
            return True
        if self.others.hold(shard):  # seen in the run folder, before a store is asked
            return False
        if self.run.store.holds(shard):
            return True
        try:
            make_logged(self.worker, shard, self.others.pace(), lambda text: append(self.log, text))
        except BoomgenError:
            raise
        except Exception as err:
            self._count(shard, err)
            return False
        self._in_a_row, self._made = 0, True
        return True

    def _count(self, shard: int, err: Exception) -> None:
        """A device that failed may fail for ever in this process; an image that is not there says nothing of others."""
        what = gist(err)
        tqdm.write(printable(f"shard {shard}: {what}"), file=sys.stderr)
        self.failures[shard] += 1
        if self.failures[shard] >= ATTEMPTS:
            self.aside[shard] = what
        self._in_a_row += self.failures[shard] == 1
        if self._in_a_row >= ATTEMPTS and not (self._made and isinstance(err, OSError)):
            raise BoomgenError(
                f"{ATTEMPTS} shards in a row failed, the last with {what}; see boomgen logs {self.run.path}"
            )


class _Others:
    """What other workers have in hand. Their staging folders change with every batch; ages are measured by this
    process's own clock, since those of machines differ. One that does not change for SILENT seconds and BATCHES
    batches of our own is made here."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._seen, self._longest = run, dict[str, tuple[int, float]](), 0.0
        self._looked, self._staged = -math.inf, dict[int, list[str]]()

    def hold(self, shard: int) -> bool:
        """Whether somebody is making this shard, and was heard of not long ago."""
        now, limit = time.monotonic(), SILENT + BATCHES * self._longest
        if now - self._looked > STALE:
            self._looked = now
            self._look()
        return any(now - self._changed(name, now) < limit for name in self._staged.get(shard, ()))

    def _look(self) -> None:
        self._staged.clear()
        with contextlib.suppress(OSError):  # there is none yet
            for name in os.listdir(self._run.staging):
                number = name.partition("-")[0]
                if number.isdecimal():
                    self._staged.setdefault(int(number), []).append(name)

    def _changed(self, name: str, now: float) -> float:
        try:
            folder = os.open(self._run.staging / name, os.O_RDONLY)  # NFS asks its server when a file is opened
        except OSError:  # it is published or abandoned
            return now
        try:
            stamp = os.fstat(folder).st_mtime_ns
        finally:
            os.close(folder)
        if self._seen.get(name, (None,))[0] != stamp:
            self._seen[name] = stamp, now
        return self._seen[name][1]

    def pace(self) -> Callable[[int], None]:
        """A tick that measures the batches of one shard."""
        last = time.monotonic()

        def tick(_: Any) -> None:
            nonlocal last
            now = time.monotonic()
            self._longest, last = max(self._longest, now - last), now

        return tick
