"""How near the hand-out comes to the ideal: 1,024 simulated workers of heavy-tailed speed, of which some die and some
are sick: they fail at each shard, in no time.

The hand-out is the real one, on a simulated clock. The ideal is what the same workers would need if work could be cut
as finely as one likes and no worker died holding any: all the work over the speed of those alive and not sick.

    python benchmarks/handout.py [SHARDS [WORKERS]]
"""

import heapq
import resource
import sys
import time
from typing import NamedTuple

import numpy as np

from boomgen.engines.handout import Event, HandOut

DYING = 0.05
SICK = 8  # in a thousand workers, as those of one node
FAILS = 0.05  # seconds after which a sick one has failed
TAIL = (
    2.0  # exponent of the speeds: times per shard are 60 s times a Pareto variable, the slowest of 1,024 about 30 fold
)
BATCHES = 10  # of a shard
NOTICED = 30.0  # seconds until a death is seen
LOOK = 1.0  # seconds after which a driver looks again at who is overdue, and who is idle
SEED = 0


Happening = tuple[float, str, int, int]
"""When; a worker ends a batch, fails, is lost or asks, or the driver looks; whose; batches left of its shard."""


class Outcome(NamedTuple):
    """What one simulation came to."""

    took: float  # simulated seconds
    ideal: float
    cpu: float  # real seconds of the hand-out alone
    heard: int  # events
    made: int  # shards, with those made twice
    failed: int  # attempts


def simulate(shards: int, workers: int) -> Outcome:
    """Hand out all shards, as a driver does: it hears each batch, looks every second who is overdue, and who is idle
    asks again then."""
    rng = np.random.default_rng(SEED)
    seconds = 60 * (1 + rng.pareto(TAIL, workers))  # of each worker, per shard
    sick = set(rng.choice(workers, max(1, workers * SICK // 1000), replace=False).tolist())
    seconds[list(sick)] = np.inf
    expected = shards / np.sum(1 / seconds)
    death = np.where(rng.random(workers) < DYING, rng.uniform(0, expected, workers), np.inf)
    handout, made, heard, now, cpu = HandOut(range(shards)), 0, 0, 0.0, 0.0

    def batch(worker: int, left: int) -> Happening:
        if worker in sick:
            return now + FAILS, "failed", worker, 0
        until = now + seconds[worker] / BATCHES * rng.lognormal(0, 0.1)
        if until < death[worker]:
            return until, "batch", worker, left
        return max(death[worker], now) + NOTICED, "lost", worker, 0

    def told(what: str, worker: int, left: int) -> Happening | None:
        """What the driver does then, and what follows for this worker."""
        if what == "look":
            assert not handout.overdue(now)
            return now + LOOK, "look", worker, 0
        if what == "lost":
            handout.failed(worker, "died")
            return None
        if what == "failed":
            handout.failed(worker, "sick")
        if what == "batch":
            handout.hear(worker, Event("tick" if left else "done", -1), now)
        if not left and handout.take(worker, now) is None:
            return now + LOOK, "ask", worker, 0
        return batch(worker, (left or BATCHES) - 1)

    events: list[Happening] = [(0.0, "ask", worker, 0) for worker in range(workers)] + [(LOOK, "look", -1, 0)]
    while handout.open:
        now, what, worker, left = heapq.heappop(events)
        start = time.process_time()
        following = told(what, worker, left)
        cpu, heard, made = cpu + time.process_time() - start, heard + 1, made + ((what, left) == ("batch", 0))
        if following:
            heapq.heappush(events, following)
    assert not handout.aside
    return Outcome(now, ideal_time(shards, seconds, death), cpu, heard, made, handout.failures.total())


def ideal_time(shards: int, seconds: np.ndarray, death: np.ndarray) -> float:
    """When workers of these speeds, each until its death, have made so much together."""
    low, high = 0.0, shards * float(np.min(seconds))
    for _ in range(100):
        middle = (low + high) / 2
        enough = np.sum(np.minimum(middle, death) / seconds) >= shards
        low, high = (low, middle) if enough else (middle, high)
    return high


def main() -> None:
    shards, workers = (int(text) for text in [*sys.argv[1:], "100000", "1024"][:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = simulate(shards, workers)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{shards:,} shards, {workers:,} workers, {DYING:.0%} of which die, {SICK / 1000:.1%} fail at all they take")
    print(f"simulated     {found.took:,.0f} s, ideal {found.ideal:,.0f} s: {found.ideal / found.took:.1%} of the ideal")
    print(f"made twice    {found.made - shards:,} shards; attempts that failed or died: {found.failed:,}")
    share = f"{found.cpu / found.took:.2%} of a core while it lasts"
    print(f"heard         {found.heard:,} events: {found.cpu:.2f} s of CPU, {share}; {memory / 1024:.0f} MiB more")


if __name__ == "__main__":
    main()
