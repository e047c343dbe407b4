"""The bare network's speed: processes that do nothing but call the planned network, in the planned shape and build."""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from boomgen.run import RunDir

_together: Barrier


class Rate(NamedTuple):
    """Image-calls (images in the batch x network calls) per second on the clock and per second of CPU time."""

    wall: float
    cpu: float


def example_of(run: RunDir) -> Any:
    """Network inputs of the planned shape."""
    import torch

    from boomgen.models.conditions import of_classes
    from boomgen.models.network import example_inputs

    x, t, label = example_inputs(run.plan.model, run.plan.network.batch_size, of_classes(run.plan.model, None))
    return torch.randn_like(x), t, label


def _start_with(barrier: Barrier) -> None:
    global _together
    _together = barrier


def _bare(path: str, seconds: float) -> Rate:
    """One process that does nothing but call the planned network."""
    import torch

    from boomgen.models.network import build, load_compiled

    torch.set_num_threads(1)
    run = RunDir(path)
    plan = run.plan.network
    network = load_compiled(run.package) if plan.package_sha256 else build(run.plan.model, getattr(torch, plan.dtype))
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
    """One process per worker, started together."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_with, (spawn.Barrier(workers),)) as pool:
        rates = list(pool.map(_bare, [str(run.path)] * workers, [seconds] * workers))
    return _all(rates)


def _all(rates: Sequence[Rate]) -> Rate:
    """Of processes that run together: their sum on the clock, their mean per CPU second."""
    return Rate(sum(rate.wall for rate in rates), mean(rate.cpu for rate in rates))


def _in_turn(path: str, shard: int, rounds: int) -> tuple[Rate, Rate]:
    """In one process, again and again: as many bare network calls as a shard takes, then the shard itself."""
    import torch

    from boomgen.worker import Worker

    run = RunDir(path)
    worker, inputs = Worker(run), example_of(run)
    batches = len(worker.batches(shard)) * run.plan.chain.level
    calls, spent = rounds * batches * run.plan.network.batch_size, np.zeros((2, 2))
    _together.wait()
    for _ in range(rounds):
        clock = [(time.perf_counter(), time.process_time())]
        with torch.inference_mode():
            for _ in range(batches):
                worker.denoiser.network(*inputs)
        clock.append((time.perf_counter(), time.process_time()))
        worker.make_shard(shard)
        clock.append((time.perf_counter(), time.process_time()))
        spent += np.diff(clock, axis=0)
    return Rate(*(calls / spent[0])), Rate(*(calls / spent[1]))


def in_turn(run: RunDir, workers: int, rounds: int) -> tuple[Rate, Rate]:
    """The bare network and whole shards, in turn in every process, so that a drift of the machine hits both alike."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_with, (spawn.Barrier(workers),)) as pool:
        rates = list(pool.map(_in_turn, [str(run.path)] * workers, range(workers), [rounds] * workers))
    bare, shards = ([pair[which] for pair in rates] for which in (0, 1))
    return _all(bare), _all(shards)
