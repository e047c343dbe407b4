"""Which shard is made next, and by whom: what all engines with a driver share.

It knows no processes and no clocks. A shard may be made twice, since both give the same bytes and one is published;
so a straggler's shard is handed out again near the end, and a worker that says nothing for long is given up.

Whether a shard or a worker is to blame for a failure is seen by what others make of it. A shard that failed waits for
somebody else, if there is anybody in order; a worker that fails at several in a row rests, while others in order go on.
Otherwise one sick node, which fails in no time, would take shard after shard and have all of them set aside.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from boomgen.errors import BoomgenError

ATTEMPTS = 3
"""A shard that failed so often is set aside, and the rest goes on."""
HOPELESS = 30
"""So many shards that fail in a row, and nobody in order, end a run: it cannot be written, or nothing can be read."""
STRAGGLES = 2.0
"""Times the usual time of a shard, after which it is handed out a second time if nothing else is left to do."""
SLOWEST = 20
"""Times the longest silence so far, after which a worker is taken for hung."""
PATIENCE = 600.0  # seconds, at the least
TICK = 5.0
"""Seconds, at the least, between two words of a worker in mid-shard: of a thousand, no driver can hear each batch."""
LOADING = 1800.0  # seconds, at the least, in which a worker that began has to be ready
WORTH = 10.0  # seconds; a shard that has been in hand for less is not handed out again
RECENT = 101  # shards that the usual time is taken of


class Event(NamedTuple):
    """What is told of a run. kind: ready, tick, done, failed, fatal; lost (a worker died), gone (it never starts) or
    waiting (of Ray: for a device)."""

    kind: str
    shard: int
    text: str = ""
    rows: int = 0
    ok: int = 0


class _Held(NamedTuple):
    shard: int
    since: float
    heard: float


class HandOut:
    """Shards, first to last, to workers that ask. Times are seconds of any one clock.

    `patience`: silence after which a worker with a shard is overdue; None: PATIENCE, and only once something was heard
    of any worker, since nobody knows how long a first batch takes.
    """

    def __init__(self, shards: Sequence[int], patience: float | None = None) -> None:
        self.queue, self.open = deque(shards), set(shards)
        self.failures, self.aside = Counter[int](), dict[int, str]()
        self._held: dict[int, _Held] = {}
        self._loading = dict[int, float]()
        self._stillborn = Counter[int]()
        self._recent = deque[float](maxlen=RECENT)
        self._asked, self._silence = patience, 0.0
        self._made, self._well = 0, set[int]()  # who made a shard, and did not fail since
        self._failed_by = dict[int, set[int]]()  # shard -> workers
        self._in_a_row = dict[int, set[int]]()  # worker -> shards at which it failed since it made one
        self._rests = dict[int, int]()  # worker -> shards that are to be made before it gets another
        self._failed_first = 0  # first attempts since anybody made a shard
        self.resting = list[int]()
        """Workers that rest, for whoever tells of it to clear."""

    def take(self, worker: int, now: float) -> int | None:
        """The next shard for an idle worker; None where there is nothing to do for it now."""
        ill = bool(self._in_a_row.get(worker))
        others = self._others(worker) if ill else None
        if others and self._made < self._rests.get(worker, 0):
            return None
        for _ in range(len(self.queue)):
            shard = self.queue.popleft()
            if shard not in self.open:  # it was made meanwhile, by a straggler
                continue
            failed = self._failed_by.get(shard)
            if not failed or not (ill or worker in failed):
                return self._hold(worker, shard, now)
            others = self._others(worker) if others is None else others
            if others <= failed:
                return self._hold(worker, shard, now)
            self.queue.append(shard)  # it waits for one of them
        straggling = None if ill and others else self._straggler(now)
        return None if straggling is None else self._hold(worker, straggling, now)

    def _others(self, worker: int) -> set[int]:
        """The others that are in order, as far as is known: they made a shard or have one, and failed at none since."""
        return {other for other in self._held.keys() | self._well if other != worker and other not in self._in_a_row}

    def _hold(self, worker: int, shard: int, now: float) -> int:
        self._held[worker] = _Held(shard, now, now)
        return shard

    def _straggler(self, now: float) -> int | None:
        if not self._recent:
            return None
        copies = Counter(held.shard for held in self._held.values())
        single = [held for held in self._held.values() if held.shard in self.open and copies[held.shard] == 1]
        first = min(single, key=lambda held: held.since, default=None)
        return first.shard if first and now - first.since > max(WORTH, STRAGGLES * median(self._recent)) else None

    def held(self, worker: int) -> int | None:
        """The shard that a worker has in hand."""
        return self._held[worker].shard if worker in self._held else None

    def hear(self, worker: int, event: Event, now: float) -> None:
        """What a worker said of itself or of its shard."""
        self._loading.pop(worker, None)
        if event.kind == "tick":
            self.tick(worker, now)
        if event.kind == "done":
            self.done(worker, now)
        if event.kind == "failed":
            self.failed(worker, event.text)

    def began(self, worker: int, now: float) -> None:
        """A worker begins to load, and is to be heard of."""
        self._loading[worker] = now

    def tick(self, worker: int, now: float) -> None:
        """A worker said that it goes on."""
        if held := self._held.get(worker):
            self._silence = max(self._silence, now - held.heard)
            self._held[worker] = held._replace(heard=now)

    def done(self, worker: int, now: float) -> None:
        """A worker has made its shard."""
        self.tick(worker, now)
        held = self._held.pop(worker)
        if self.queue or len(self._recent) < RECENT:  # of what is left at the end, most is slow
            self._recent.append(now - held.since)
        self.open.discard(held.shard)
        self.aside.pop(held.shard, None)  # others may have failed at it
        self._failed_by.pop(held.shard, None)
        self._made, self._failed_first = self._made + 1, 0
        self._well.add(worker)
        self._in_a_row.pop(worker, None)
        self._rests.pop(worker, None)

    def failed(self, worker: int, why: str) -> int | None:
        """A worker could not make its shard, or has gone: the shard, for somebody else to try; None: it had none.

        Raises:
            BoomgenError: HOPELESS shards in a row failed, and nobody is in order.
        """
        self._well.discard(worker)
        self._loading.pop(worker, None)
        if (held := self._held.pop(worker, None)) is None:
            return None
        self._blame(worker, held.shard)
        if held.shard not in self.open:
            return None
        self.failures[held.shard] += 1
        self._failed_first += self.failures[held.shard] == 1
        if self._failed_first >= HOPELESS and self.alone(worker):
            raise BoomgenError(f"{self._failed_first} shards in a row failed, the last with {why}")
        if self.failures[held.shard] < ATTEMPTS:
            self.queue.append(held.shard)
        else:
            self.open.discard(held.shard)
            self.aside[held.shard] = why
        return held.shard

    def _blame(self, worker: int, shard: int) -> None:
        """A worker that failed at ATTEMPTS shards in a row rests until others made as many, then twice as many ..."""
        self._failed_by.setdefault(shard, set()).add(worker)
        row = self._in_a_row.setdefault(worker, set())
        row.add(shard)
        if len(row) >= ATTEMPTS:
            self._rests[worker] = self._made + ATTEMPTS * 2 ** (len(row) - ATTEMPTS)
        if len(row) == ATTEMPTS and not self.alone(worker):
            self.resting.append(worker)

    def alone(self, worker: int) -> bool:
        """Whether nobody else is known to be in order."""
        return not self._others(worker)

    def again(self, worker: int, started: bool) -> bool:
        """Whether to start a worker that has gone again: not if it was its third start that came to nothing."""
        self._loading.pop(worker, None)
        self._stillborn[worker] = 0 if started else self._stillborn[worker] + 1
        return self._stillborn[worker] < ATTEMPTS

    def overdue(self, now: float) -> list[int]:
        """Workers that have said nothing for too long: with a shard, or since they began to load."""
        load = max(LOADING, self._asked or 0.0)
        late = [worker for worker, since in self._loading.items() if now - since > load]
        if self._asked is None and not self._silence:
            return late
        limit = max(PATIENCE if self._asked is None else self._asked, SLOWEST * self._silence)
        return late + [worker for worker, held in self._held.items() if now - held.heard > TICK + limit]


def set_aside(aside: Mapping[int, str], run: Path) -> None:
    """Raises BoomgenError where shards were set aside."""
    if aside:
        shard, text = next(iter(aside.items()))
        raise BoomgenError(
            f"{len(aside)} shards failed {ATTEMPTS} times and were set aside; shard {shard}: {text}; "
            f"see boomgen logs {run}"
        )
