"""Every engine as its user has it, by the same few operations: start a run by the real program, lose what this engine
can lose, and go on.

    going = engine.start(run)    # 2 workers; the run is planned
    going.busy()                 # -> pids of workers in mid-shard, once there are two and a shard is whole
    going.lose()                 # the loss of this engine, from which a run is to come back
    code, out, err = going.end()
    engine.finish(run)           # what a user does next; the run is whole then
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from boomgen.run import RunDir

from ..driver import Driver, users_of
from .slurm_cluster import NODES, Cluster, slurm_cluster

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --master-port 0",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
}
NAMES = ("local", "ray", *LAUNCHERS, "slurm")


def launcher(name: str, *more: str) -> tuple[str, ...]:
    """The beginning of a command line, to be followed by `boomgen` and its arguments."""
    return (sys.executable, "-m", *LAUNCHERS[name].split(), *more, "-m")


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    """What `what` returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)
    return found


class Ended(NamedTuple):
    """How a run ended: an exit code and all that was said."""

    code: int
    out: str
    err: str


@dataclass
class Going:
    """A run under way.

    `lose`: the loss of this engine. `stop`: what asks it to end in order. `end`: waits for its end, whatever ends it.
    `over`: whether it has ended. `others`: pids of what it lives on besides its workers, by their names; each may be
    killed at any time.
    """

    run: RunDir
    lose: Callable[[], object]
    stop: Callable[[], object]
    end: Callable[[], Ended]
    over: Callable[[], bool]
    others: Callable[[], dict[str, int]]

    def workers(self) -> list[int]:
        """Pids of the workers that are in mid-shard."""
        return users_of(self.run.staging)

    def busy(self, workers: int = 2) -> list[int]:
        """Their pids, once there are so many and at least one more shard is whole."""
        whole = len(self.run.published())

        def found() -> list[int] | None:
            assert not self.over(), self.end()
            if len(self.run.published()) > whole and len(pids := self.workers()) >= workers:
                return pids
            return None

        return list(wait_for(found))

    def gone(self) -> bool:
        """Whether no process works on the run any more, after a while at most."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not users_of(self.run.path), seconds=30)
        return not users_of(self.run.path)


def _of_process(run: RunDir, driver: Driver, name: str = "driver", lose: Callable[[], object] | None = None) -> Going:
    process = driver.process
    return Going(
        run,
        lose or process.kill,
        process.terminate,
        lambda: Ended(*driver.end()),
        lambda: process.poll() is not None,
        lambda: {} if process.poll() is not None else {name: process.pid},
    )


class Engine:
    """One way to make a run. `name` is one of NAMES; `close` ends what was started for all its runs."""

    name: str

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        """Begin a planned run, or go on with it; `more` are options of its command."""
        raise NotImplementedError

    def finish(self, run: RunDir) -> Ended:
        """Go on with a run after whatever happened to it, and see it whole."""
        ended = self.start(run, workers=1).end()
        assert ended.code == 0, ended.err
        return ended

    def close(self) -> None:
        """Nothing by itself."""


class Local(Engine):
    """`boomgen resume`."""

    name = "local"

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        where = ("--device", "cpu", "--workers", str(workers))
        return _of_process(run, Driver(run, "boomgen", "resume", str(run.path), *where, *map(str, more)))


class Ranks(Engine):
    """`boomgen resume` by torchrun or accelerate launch, always with two ranks; `options` are the launcher's."""

    def __init__(self, name: str, *options: str) -> None:
        self.name, self._launcher = name, launcher(name, *options)

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        command = ("boomgen", "resume", str(run.path), "--device", "cpu", *map(str, more))
        return _of_process(run, Driver(run, *command, launcher=self._launcher), "launcher")


class Ray(Engine):
    """`boomgen resume --engine ray` on a cluster of two nodes of one core, on addresses of this machine."""

    name = "ray"

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.cluster: Any = None

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        self.mend()
        (second,) = self.cluster.worker_nodes
        where = ("--device", "cpu", "--workers", str(workers), "--ray-address", self.cluster.address)
        command = ("boomgen", "resume", str(run.path), "--engine", "ray", *where, *map(str, more))
        going = _of_process(run, Driver(run, *command), lose=lambda: self._remove(second))
        of_driver = going.others
        going.others = lambda: of_driver() | _raylet(second)
        return going

    def mend(self) -> None:
        """Have the second node there."""
        if self.cluster is None:
            self.cluster = self._stack.enter_context(ray_cluster(NODE))
        for node in list(self.cluster.worker_nodes):
            if not _raylet(node):
                self._remove(node)
        if not self.cluster.worker_nodes:
            self.cluster.add_node(**NODE, node_ip_address="127.0.0.3")

    def _remove(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._stack.close()


NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def _raylet(node: Any) -> dict[str, int]:
    return {kind: process.pid for kind, process in node.live_processes() if kind == "raylet"}


@contextlib.contextmanager
def ray_cluster(node: dict[str, int]) -> Iterator[Any]:
    """A cluster with one such node. A lost one is noticed within seconds, and actors do not wait behind other tests."""
    from ray.cluster_utils import Cluster as RayCluster

    short = tempfile.mkdtemp(dir="/tmp")
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # where Cluster writes its address, whatever it is told
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}
    first = {"include_dashboard": False, "temp_dir": short, "node_ip_address": "127.0.0.2"}
    first["_system_config"] = health | {"health_check_failure_threshold": 3, "worker_niceness": 0}
    cluster = RayCluster(initialize_head=True, head_node_args=node | first)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(short, ignore_errors=True)


class Slurm(Engine):
    """`boomgen slurm --submit` to a cluster of two nodes of one core: an array of two, and the job that closes."""

    name = "slurm"

    def __init__(self, folder: Path, boomgen: Any) -> None:
        self._stack, self._folder, self._boomgen = contextlib.ExitStack(), folder, boomgen
        self._cluster: Cluster | None = None

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            self._cluster = self._stack.enter_context(slurm_cluster(self._folder))
        return self._cluster

    def submit(self, run: RunDir, *more: Any) -> str:
        """What `boomgen slurm --submit` says."""
        small = ("--array-size", 2, "--cpus-per-task", 1, "--mem", "2G")
        env = os.environ | self.cluster.env | {"OMP_NUM_THREADS": "1"}
        return str(self._boomgen("slurm", run.path, "--submit", *small, *more, env=env).stdout)

    def start(self, run: RunDir, *more: Any, workers: int = 2) -> Going:
        self.cluster.mend()
        said = self.submit(run, *more)
        jobs = [line.split()[1] for line in said.splitlines() if line.startswith(("array", "finalise"))]
        if not jobs:
            return Going(run, *[lambda: None] * 2, lambda: Ended(0, said, ""), lambda: True, dict)
        array, closing = jobs

        def end() -> Ended:
            self.cluster.wait_ended(closing)
            logs = [path.read_text() for path in sorted(run.logs.glob(f"slurm-{array}_*.log"))]
            code = int(self.cluster.told(closing, "ExitCode").partition(":")[0])
            return Ended(code, (run.path / f"finalise-{closing}.log").read_text(), "".join(logs))

        return Going(
            run,
            self._lose,
            lambda: self.cluster.run("scancel", array),
            end,
            lambda: False,  # to ask takes longer than a shard
            lambda: {name: found.pid for name, found in self.cluster.daemons.items() if name in NODES},
        )

    def _lose(self) -> None:
        """One node is gone for a moment, and what runs on the other is requeued: each element starts again."""
        self.cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
        for job in self.cluster.run("squeue", "-hrtrunning", "-wn1", "-o%i").split():
            self.cluster.run("scontrol", "requeue", job)
        self.cluster.run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may be back by itself

    def close(self) -> None:
        self._stack.close()


def engine(name: str, folder: Path, boomgen: Any) -> Engine:
    """An engine by its name. `folder`: an empty one, for SLURM; `boomgen`: the fixture."""
    if name in LAUNCHERS:
        return Ranks(name)
    return {"local": Local, "ray": Ray}[name]() if name != "slurm" else Slurm(folder, boomgen)
