"""How much of the bare network's speed a whole boomgen job keeps, and how fast the usual hand-written loop is.

All on this machine, in turn: the bare network (one process per worker, started together, the job's batch shape,
precision and build), `boomgen plan` and `boomgen resume`, the bare network again, then plain_loop.py. Where a busy
machine blurs seconds, the column per CPU second holds.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from common import Took, boomgen, machine, table, timed
from phases import phases, steady, where

from boomgen import env
from boomgen.plan import Plan
from boomgen.run import RunDir

_together: Barrier


class Rate(NamedTuple):
    """Image-calls (images in the batch x network calls) per second on the clock and per second of CPU time."""

    wall: float
    cpu: float


def example_of(run: RunDir) -> Any:
    """Network inputs of the planned shape."""
    import torch

    from boomgen.models.pixel_unet import example_inputs

    x, t, label = example_inputs(run.plan.model, run.plan.network.batch_size)
    return torch.randn_like(x), t, label


def _start_with(barrier: Barrier) -> None:
    global _together
    _together = barrier


def _bare(path: str, seconds: float) -> Rate:
    """One process that does nothing but call the planned network."""
    import torch

    from boomgen.models.pixel_unet import Network, load_compiled

    torch.set_num_threads(1)
    run = RunDir(path)
    plan = run.plan.network
    network = load_compiled(run.package) if plan.package_sha256 else Network(run.plan.model, getattr(torch, plan.dtype))
    inputs = example_of(run)
    with torch.inference_mode():
        network(*inputs)
        _together.wait()
        start, cpu, calls = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            network(*inputs)
            calls += plan.batch_size
        return Rate(calls / (time.perf_counter() - start), calls / (time.process_time() - cpu))


def bare(run: RunDir, workers: int, seconds: float) -> Rate:
    """All processes together: their sum on the clock, their mean per CPU second."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_with, (spawn.Barrier(workers),)) as pool:
        rates = list(pool.map(_bare, [str(run.path)] * workers, [seconds] * workers))
    return Rate(sum(rate.wall for rate in rates), mean(rate.cpu for rate in rates))


def _one_shard(path: str) -> Rate:
    """The first shard made once more, in a process of its own that already has the model: CPU time without start-up."""
    import torch

    from boomgen.worker import Worker

    torch.set_num_threads(1)
    run = RunDir(path)
    worker, calls = Worker(run), len(run.plan.positions(0)) * run.plan.chain.level
    worker.denoiser.network(*example_of(run))
    start, cpu = time.perf_counter(), time.process_time()
    worker.make_shard(0)
    return Rate(calls / (time.perf_counter() - start), calls / (time.process_time() - cpu))


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
    parser.add_argument("--bare-seconds", type=float, default=15)
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
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            again = pool.submit(_one_shard, out).result()
        plan, level, spent = run.plan, run.plan.chain.level, phases(run, begun, resuming.wall)
        base = Rate(mean((before.wall, after.wall)), mean((before.cpu, after.cpu)))
        calls = plan.rows * level
        whole = Took(*map(sum, zip(planning, resuming, strict=True)))
        job = Rate(steady(run, args.workers) * level, calls / resuming.cpu)
    build = f"{plan.network.dtype} {'compiled' if plan.network.package_sha256 else 'eager'}"
    lines = [
        (f"bare network, {build}, {args.workers} x 1 thread, before", before),
        ("the same, after", after),
        ("boomgen, one shard made again, 1 process", again),
        (f"boomgen, {plan.rows} images, while shards are made (CPU: with start-up)", job),
        ("boomgen, from command to finished data set", Rate(calls / whole.wall, calls / whole.cpu)),
    ]
    print(report(plan, lines, base), "\n\n", where(planning, resuming, spent), "\n", sep="", flush=True)
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
