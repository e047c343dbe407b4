"""How near the hand-out comes to the ideal: 1,024 simulated workers of heavy-tailed speed, some of which die.

The hand-out is the real one, on a simulated clock. The ideal is what the same workers would need if work could be cut
as finely as one likes and no worker died holding any: all the work over the speed of those alive.

    python benchmarks/handout.py [SHARDS [WORKERS]]
"""

import heapq
import resource
import sys
import time
from typing import NamedTuple

import numpy as np

from boomgen.engines.handout import HandOut

DYING = 0.05
TAIL = (
    2.0  # exponent of the speeds: times per shard are 60 s times a Pareto variable, the slowest of 1,024 about 30 fold
)
NOTICED = 30.0  # seconds until a death is seen
SEED = 0


class Outcome(NamedTuple):
    """What one simulation came to."""

    took: float  # simulated seconds
    ideal: float
    cpu: float  # real seconds of the hand-out alone
    made: int  # shards, with those made twice


def simulate(shards: int, workers: int) -> Outcome:
    """Hand out all shards."""
    rng = np.random.default_rng(SEED)
    seconds = 60 * (1 + rng.pareto(TAIL, workers))  # of each worker, per shard
    expected = shards / np.sum(1 / seconds)
    death = np.where(rng.random(workers) < DYING, rng.uniform(0, expected, workers), np.inf)
    handout, made, now, cpu = HandOut(range(shards)), 0, 0.0, 0.0
    # (when, what, worker): done, lost, or asks for work
    events = [(0.0, "ask", worker) for worker in range(workers)]
    while handout.open:
        now, what, worker = heapq.heappop(events)
        start = time.process_time()
        if what == "done":
            handout.done(worker, now)
            made += 1
        if what == "lost":
            handout.failed(worker, "died")
        shard = handout.take(worker, now) if what != "lost" else None
        cpu += time.process_time() - start
        if what == "lost":
            continue
        until = now + seconds[worker] * rng.lognormal(0, 0.1)
        if shard is None:
            heapq.heappush(events, (now + 1, "ask", worker))  # engines ask again every second
        elif until < death[worker]:
            heapq.heappush(events, (until, "done", worker))
        else:
            heapq.heappush(events, (max(death[worker], now) + NOTICED, "lost", worker))
    assert not handout.aside
    return Outcome(now, ideal_time(shards, seconds, death), cpu, made)


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
    print(f"{shards:,} shards, {workers:,} workers, {DYING:.0%} of which die")
    print(f"simulated     {found.took:,.0f} s, ideal {found.ideal:,.0f} s: {found.ideal / found.took:.1%} of the ideal")
    print(f"made twice    {found.made - shards:,} shards")
    print(f"hand-out      {found.cpu:.2f} s of CPU, {found.cpu / shards * 1e6:.0f} us a shard; {memory / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
