"""From a job to a finished data set on one machine: plan, hand out, finalise, tell."""

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from boomgen import env
from boomgen.engines.handout import Event
from boomgen.engines.local import LocalEngine
from boomgen.engines.ray import RayEngine
from boomgen.errors import BoomgenError, Stopped
from boomgen.finalise import finalise
from boomgen.job import Job, Launch
from boomgen.prepare import prepare
from boomgen.progress import say_terms, show
from boomgen.run import RunDir, Status


def run(job: Job, launch: Launch | None = None) -> RunDir:
    """Plan `job` (or find its plan), make what is missing, and close the run: the Python form of `boomgen anonymize`.

    Raises:
        BoomgenError: one line on what stopped it; the run folder stays resumable.
    """
    launch = launch or Launch()
    with _signals():
        env.choose_device(launch)
        run_dir = prepare(job, launch)
        say_terms(run_dir.plan)
        resume(run_dir, launch)
    return run_dir


def resume(run: RunDir, launch: Launch) -> Status:
    """Make the missing shards of a planned run and close it. A finished run returns at once and loads no torch."""
    status = run.status()
    if status.finalised and not status.missing:
        return status
    with _signals(), only_driver(run):
        try:
            if missing := run.missing():
                _make(run, launch, missing)
            finalise(run)
        except Stopped as err:
            err.run = run.path
            raise
    return run.status()


def _make(run: RunDir, launch: Launch, missing: list[int]) -> None:
    with _closing(_engine(run, launch).run(missing)) as events:
        show(run.plan, missing, events)


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
    """SIGINT and SIGTERM as an orderly stop, where signals arrive: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
