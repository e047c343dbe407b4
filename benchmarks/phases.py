"""Where the time of a finished run went, from its done records, their times of writing, and the workers' logs."""

import re
from statistics import mean
from typing import NamedTuple

from common import Took, table

from boomgen.run import RunDir
from boomgen.shard import DONE


class Phases(NamedTuple):
    """Where the time of `boomgen resume` goes: seconds, mean over the workers."""

    start: float
    infer: float
    beside: float
    between: float
    tail: float
    close: float


def phases(run: RunDir, begun: float, wall: float) -> Phases:
    """From the done records' seconds, the times at which they were written, and who wrote them (the logs)."""
    first, last, infer, beside, between = [], [], [], [], []
    for log in sorted(run.logs.glob("*.log")):
        shards = [int(number) for number in re.findall(r"shard (\d+) done", log.read_text())]
        times = [(run.shard(shard) / DONE).stat().st_mtime for shard in shards]
        seconds = [run.done(shard)["seconds"] for shard in shards]
        total, network = (sum(each[name] for each in seconds) for name in ("total", "infer"))
        first.append(times[0] - seconds[0]["total"])
        last.append(times[-1])
        infer.append(network)
        beside.append(total - network)
        between.append(last[-1] - first[-1] - total)
    end = max(last)
    return Phases(mean(first) - begun, mean(infer), mean(beside), mean(between), end - mean(last), begun + wall - end)


def steady(run: RunDir, workers: int) -> float:
    """Images per second while shards are being made, from their done records."""
    seconds = sum(run.done(shard)["seconds"]["total"] for shard in range(run.plan.shards))
    return float(workers * run.plan.rows / seconds)


def where(planning: Took, resuming: Took, spent: Phases) -> str:
    names = (
        "worker start-up (imports, model)",
        "network calls, noise, Boomerang's arithmetic",
        "reading and encoding that nothing hid",
        "between shards (close, fsync, rename, hand-out)",
        "tail (one worker has no shard left)",
        "finalise and exit",
    )
    lines = [("plan (imports, index, compile)", planning.wall), *zip(names, spent, strict=True)]
    whole = planning.wall + resuming.wall
    return table(("where the job's time goes", "s", "%"), [(n, f"{s:.2f}", f"{100 * s / whole:.1f}") for n, s in lines])
