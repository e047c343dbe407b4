"""From a job to a finished data set: plan, hand out, finalise, tell."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

from boomgen import env
from boomgen.engines import ranks
from boomgen.engines.handout import Event
from boomgen.engines.local import LocalEngine
from boomgen.engines.ranks import Rank, own, rank_of
from boomgen.engines.ray import RayEngine
from boomgen.engines.slurm import requeue
from boomgen.errors import BoomgenError, Stopped, UsageError
from boomgen.finalise import finalise
from boomgen.heartbeat import bury
from boomgen.job import Job, Launch
from boomgen.prepare import await_plan, prepare
from boomgen.progress import bar, say_terms, show
from boomgen.run import RunDir


def run(job: Job, launch: Launch | None = None) -> RunDir:
    """Plan `job` (or find its plan), make what is missing, and close the run: the Python form of `boomgen anonymize`.

    Raises:
        BoomgenError: one line on what stopped it; the run folder stays resumable.
    """
    launch = launch or Launch()
    with _signals():
        rank = _rank(launch)
        if rank and rank.rank > 0:
            run_dir = await_plan(job, launch)
        else:
            env.choose_device(launch)
            run_dir = prepare(job, launch)
            say_terms(run_dir.plan)
        resume(run_dir, launch)
    return run_dir


def resume(run: RunDir, launch: Launch) -> None:
    """Make the missing shards of a planned run and close it. A finished run loads no torch.

    As one of several ranks, make a share of them; rank 0 closes the run.
    """
    rank = _rank(launch)
    if rank and rank.rank > 0:
        work(run, launch)
        return
    if not run.plan.store and run.store.closed() and not run.missing():
        return  # in an object store, the shards' own copies may still have to go
    with _driving(run):
        if missing := run.missing():
            if rank:
                with bar(run):
                    _work(run, launch, missing, rank)
            else:
                _make(run, launch, missing)
        finalise(run)


def close(run: RunDir) -> None:
    """Close a run whose shards are all whole."""
    with _driving(run):
        finalise(run)


@contextmanager
def _driving(run: RunDir) -> Iterator[None]:
    with _signals(), only_driver(run):
        try:
            yield
        except Stopped as err:
            err.run = run.path
            raise


def _rank(launch: Launch) -> Rank | None:
    """This process's place among those of a launcher.

    Raises:
        UsageError: two engines at once.
    """
    rank = rank_of(os.environ)
    if rank and launch.engine == "ray":
        raise UsageError(f"--engine ray beside {rank.world_size} processes of a launcher; start boomgen by one of both")
    return rank


def _make(run: RunDir, launch: Launch, missing: list[int]) -> None:
    bury(run)
    with _closing(_engine(run, launch).run(missing)) as events:
        show(run, events)


def _engine(run: RunDir, launch: Launch) -> LocalEngine | RayEngine:
    launch = launch.model_copy(update=_as_planned(run, launch))
    how = (launch.allow_mixed, launch.patience)
    if launch.ray_address:  # its devices are not those of this machine
        there = launch.device or "cuda"
        return RayEngine(run, there, launch.gpus if there == "cuda" else launch.workers, launch.ray_address, *how)
    kind, workers = env.choose_device(launch)
    if launch.engine == "ray":
        return RayEngine(run, kind, workers, None, *how)
    devices = [f"cuda:{number}" for number in range(workers)] if kind == "cuda" else ["cpu"] * workers
    return LocalEngine(run, devices, *how)


def is_alone() -> bool:
    """Whether no launcher started this process beside others."""
    return rank_of(os.environ) is None


def is_first() -> bool:
    """Whether this process is the one that tells of the run: alone, or rank 0."""
    rank = rank_of(os.environ)
    return rank is None or rank.rank == 0


def work(run: RunDir, launch: Launch, part: Rank | None = None, shards: Sequence[int] | None = None) -> list[int]:
    """One worker in this process, which makes what is missing of its part, or of these shards; else it shares all with
    the other ranks of its launcher. It closes nothing. What it was to make, with what was whole before.

    Raises:
        UsageError: a part or shards are named, and a launcher started several processes, which would all make them.
        BoomgenError: shards failed for good; the others are whole. Or an element of an array makes no progress.
    """
    rank = rank_of(os.environ)
    if rank and (part or shards is not None):
        raise UsageError(f"{rank.world_size} processes would all make the same shards; drop --part and --shards")
    chosen = _chosen(run, part, shards)
    missing = sorted(set(chosen) & set(run.missing()))
    try:
        with _signals(), bar(run) if is_first() and part is None and shards is None else nullcontext():
            _work(run, launch, missing, part or rank or Rank(0, 1, 0))
    except Stopped as err:
        err.run = run.path
        err.requeued = str(err) == signal.SIGUSR1.name and requeue(progress=_any_whole(run, missing))
        raise
    return chosen


def _any_whole(run: RunDir, shards: Sequence[int]) -> bool:
    """Whether one of them is whole; also where a store does not say."""
    try:
        return not run.published().isdisjoint(shards)
    except BoomgenError:
        return True


def _chosen(run: RunDir, part: Rank | None, shards: Sequence[int] | None) -> list[int]:
    """The shards of a part, or of those that are named; without both, all."""
    named = sorted(set(shards)) if shards is not None else list(range(run.plan.shards))
    return own(named, part) if part else named


def _work(run: RunDir, launch: Launch, missing: list[int], rank: Rank) -> None:
    ranks.work(run, missing, rank, launch.device or run.plan.network.device, launch.allow_mixed)


def _as_planned(run: RunDir, launch: Launch) -> dict[str, str]:
    return {} if launch.device or launch.gpus else {"device": run.plan.network.device}


@contextmanager
def _closing(events: Iterator[Event]) -> Iterator[Iterator[Event]]:
    try:
        yield events
    finally:
        events.close()  # type: ignore[attr-defined]


@contextmanager
def only_driver(run: RunDir) -> Iterator[None]:
    """Two drivers would make every shard twice. The lock ends with this process, however it ends."""
    path = run.path / "plan.json"
    with path.open("rb+" if os.access(path, os.W_OK) else "rb") as plan:  # NFS locks only what may be written
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise BoomgenError(
                f"{run.path} is being made by another boomgen; wait for its end, or stop it and go on with: "
                f"boomgen resume {run.path}"
            ) from err
        except OSError:  # a disk without locks: work done twice does no harm
            pass
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT, SIGTERM, and SIGUSR1 (SLURM's warning), as an orderly stop, where signals arrive: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
