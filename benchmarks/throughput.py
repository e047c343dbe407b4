"""How much of the bare network's speed a whole boomgen job keeps, and how fast the usual hand-written loop is.

All on this machine, in turn: the bare network (one process per worker, started together, the job's batch shape,
precision and build), `boomgen plan` and `boomgen resume`, the bare network again, then plain_loop.py. Where a busy
machine blurs seconds, the column per CPU second holds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from bare import Rate, bare, in_turn
from common import Took, boomgen, machine, table, timed
from phases import phases, steady, where

from boomgen import env
from boomgen.plan import Plan
from boomgen.run import RunDir


def loop(images: int, levels: int, *options: str) -> tuple[Rate, float]:
    """plain_loop.py: its rate without start-up, and the seconds of its first call."""
    script = Path(__file__).parent / "plain_loop.py"
    took, out = timed([sys.executable, script, "--images", images, "--levels", levels, *options])
    found = json.loads(out)
    return Rate(found["image_calls_per_s"], images * levels / took.cpu), found["first_call"]


def report(plan: Plan, lines: list[tuple[str, Rate]], base: Rate) -> str:
    level = plan.chain.level
    rows = [
        (
            what,
            f"{rate.wall:.1f}",
            f"{rate.wall / level:.2f}",
            f"{rate.wall / base.wall:.3f}",
            f"{rate.cpu:.1f}",
            f"{rate.cpu / base.cpu:.3f}",
        )
        for what, rate in lines
    ]
    return table(("", "image-calls/s", f"images/s at {level} calls", "to bare", "per CPU s", "to bare"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="images of the job, at most 1,000")
    parser.add_argument("--t-boom", default="0.4", help="of 100 steps")
    parser.add_argument("--workers", type=int, default=env.cores())
    parser.add_argument("--compile", choices=["yes", "no", "auto"], default="auto", help="of boomgen's network")
    parser.add_argument("--bare-seconds", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=2, help="of bare calls and a shard in turn")
    parser.add_argument("--loop-images", type=int, default=192, help="images of the fp32 loops; 0 leaves all loops out")
    args = parser.parse_args()
    print(machine(), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        options = ["--dataset", "fashion-sample", "--limit", args.images, "--t-boom", args.t_boom, "--device", "cpu"]
        options += [] if args.compile == "auto" else ["--compile", args.compile]
        planning = boomgen("plan", *options, "--out", out)
        run = RunDir(out)
        before = bare(run, args.workers, args.bare_seconds)
        begun = time.time()
        resuming = boomgen("resume", out, "--device", "cpu", "--workers", args.workers)
        after = bare(run, args.workers, args.bare_seconds)
        network, shards = in_turn(run, min(args.workers, run.plan.shards), args.rounds)
        plan, level, spent = run.plan, run.plan.chain.level, phases(run, begun, resuming.wall)
        base = Rate(mean((before.wall, after.wall)), mean((before.cpu, after.cpu)))
        calls = plan.rows * level
        whole = Took(*map(sum, zip(planning, resuming, strict=True)))
        job = Rate(steady(run, args.workers) * level, calls / resuming.cpu)
    build = f"{plan.network.dtype} {'compiled' if plan.network.package_sha256 else 'eager'}"
    lines = [
        (f"bare network, {build}, {args.workers} x 1 thread, before", before),
        ("the same, after", after),
        (f"boomgen, {plan.rows} images, while shards are made (CPU: with start-up)", job),
        ("boomgen, from command to finished data set", Rate(calls / whole.wall, calls / whole.cpu)),
    ]
    pair = [("bare network, in turn with", network), ("whole shards: read, noise, encode, hash, write", shards)]
    print(
        report(plan, lines, base),
        report(plan, pair, network),
        where(planning, resuming, spent),
        "",
        sep="\n\n",
        flush=True,
    )
    if args.loop_images:
        few = 8 if env.default_dtype("cpu") != "bfloat16" else level  # calls; enough where bfloat16 is emulated
        eager, _ = loop(args.loop_images, level)
        compiled, first = loop(args.loop_images, level, "--compile")
        half, half_first = loop(64, few, "--compile", "--dtype", "bfloat16")
        loops = [
            (f"plain loop, fp32 eager, {args.loop_images} images, all cores", eager),
            (f"plain loop, fp32 torch.compile (its first call: {first:.0f} s, left out)", compiled),
            (f"plain loop, bf16 torch.compile, 64 images x {few} calls (first call: {half_first:.0f} s)", half),
        ]
        print(report(plan, loops, base))


if __name__ == "__main__":
    main()
