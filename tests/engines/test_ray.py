"""Real Ray: what is of this engine alone. What all engines bear is in test_conformance."""

import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from boomgen.run import RunDir
from boomgen.worker import Worker
from tests.conftest import Complaint, PlanTiny
from tests.engines.engines import NODE, ray_cluster
from tests.finished import command_line, made
from tests.test_bytes import AUGMENT, Driver, finish_missing

JOB = AUGMENT | {"steps": 100}  # 15 shards of one batch
TOKEN = "hf_of_the_test"
MADEUP = Path(__file__).parents[1] / "madeup"


class RayDriver(Driver):
    """`boomgen resume --engine ray` as a process of its own, with every process that Ray starts for it."""

    def __init__(self, run: RunDir, *more: str) -> None:
        where = ("--device", "cpu", "--workers", "2", "--engine", "ray", *more)
        super().__init__(run, "boomgen", "resume", str(run.path), *where)
        self.seen: set[psutil.Process] = set()

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def actors(self) -> list[psutil.Process]:
        self.look()
        return [process for process in self.seen if _told(process).startswith("ray::Actor")]

    def wait_busy(self) -> None:
        """Until a shard is whole, and both actors have one in hand."""
        self.wait_published(len(self.run.published()) + 1)
        self.wait_for(lambda: _in_hand(self.run) == 2 == len(self.actors()))

    def no_orphan(self) -> bool:
        end = time.monotonic() + 30
        while any(map(_told, self.seen)) and time.monotonic() < end:
            time.sleep(0.05)
        return not any(map(_told, self.seen))


def _in_hand(run: RunDir) -> int:
    return len(list(run.staging.iterdir()))


def _told(process: psutil.Process) -> str:
    """Its command line; '' once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_stopped(
    plan_tiny: PlanTiny,
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sent: signal.Signals,
) -> None:
    """Begun by a local worker, gone on with by a Ray of our own and stopped there, finished by a local worker: the same
    bytes. The stop is exit 75 in one line, with nothing half-made and no process of Ray's left; a token of the
    environment is in none of theirs."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = plan_tiny(tmp_path / "run", **JOB)
    Worker(run).make_shard(3)
    driver = RayDriver(run)
    driver.wait_busy()
    environments = {_told(process): process.environ() for process in driver.seen if process.is_running()}
    assert len(environments) > 4
    assert not [name for name, found in environments.items() if TOKEN in found.values() or TOKEN in name]
    driver.process.send_signal(sent)
    code, out, err = driver.end()
    assert (code, out) == (75, ""), err
    said = f"stopped ({sent.name}); what is whole stays, go on with: boomgen resume {run.path}"
    assert err.splitlines()[-1] == f"boomgen: {said}"
    assert list(run.staging.iterdir()) == []
    assert driver.no_orphan()
    assert 1 < len(run.published()) < 15
    finish_missing(run)
    assert made(run) == undisturbed(**JOB)


def test_wrong_use(complaint: Complaint, plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each, for options that do not fit, a cluster that is not there, and Ray not installed."""
    run = plan_tiny(tmp_path / "run", limit=16).path
    (run / "logs").mkdir()
    (run / "logs" / "ray.out").touch()
    said = complaint("resume", run, "--ray-address", "auto")
    assert said == "--ray-address 'auto': is for Ray alone; add --engine ray"
    said = complaint("resume", run, "--engine", "ray", "--ray-address", "ray://head:10001")
    assert said == "--ray-address 'ray://head:10001': expected auto or host:port"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        said = complaint("resume", run, "--engine", "ray", "--ray-address", address, code=1)
    assert said == f"no Ray cluster at {address}: [Errno 111] Connection refused"
    monkeypatch.setenv("RAY_ADDRESS", address)  # of a cluster that has ended
    said = complaint("resume", run, "--engine", "ray", "--ray-address", "auto", code=1)
    assert said == "no Ray cluster at auto: [Errno 111] Connection refused"
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.2:10001")
    said = complaint("resume", run, "--engine", "ray", "--ray-address", "auto", code=1)
    assert said == "no Ray cluster at auto: Invalid address format: ray://127.0.0.2:10001"
    monkeypatch.setitem(sys.modules, "ray", None)
    said = complaint("resume", run, "--engine", "ray")
    assert said == "--engine ray needs Ray, which is not installed; pip install 'boomgen[ray]'"


# What takes long ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_driver_killed(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """SIGKILL of the driver: its actors end by themselves, and the run goes on locally. Ray's agents, which do nothing
    then, take longer to notice."""
    run = plan_tiny(tmp_path / "run", **JOB)
    driver = RayDriver(run)
    driver.wait_busy()
    driver.seen = set(driver.actors())
    driver.process.kill()
    driver.end()
    assert driver.no_orphan()
    finish_missing(run)
    assert made(run) == undisturbed(**JOB)


@pytest.mark.slow
def test_an_actor_per_gpu(plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boomgen: Any) -> None:
    """Of a running cluster, which stays; the two GPUs are made up."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(MADEUP), os.environ.get("PYTHONPATH")])))
    job, node = plan_tiny(tmp_path / "cpu", **JOB).plan.job, NODE | {"num_gpus": 1}
    _, *options = command_line(job, tmp_path / "run", "--device", "cuda", verb="augment")
    boomgen("plan", "--mode", "augment", *options)
    run = RunDir(tmp_path / "run")
    with ray_cluster(node) as cluster:
        cluster.add_node(**node, node_ip_address="127.0.0.3")
        boomgen("resume", run.path, "--engine", "ray", "--ray-address", cluster.address)
        assert len(cluster.list_all_nodes()) == 2
    assert len(list(run.logs.glob("worker-*.log"))) == 2
    assert boomgen("verify", run.path, "--remake", 2).stdout.endswith("2 of them made again\n")
