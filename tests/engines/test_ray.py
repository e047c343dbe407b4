"""Real Ray: the same bytes through kills and stops, by its engine and the local one in turn, and no word of Ray's."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from boomgen.cli import main
from boomgen.run import RunDir
from boomgen.worker import Worker
from tests.conftest import Complaint, PlanTiny
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


def test_actor_killed(
    plan_tiny: PlanTiny,
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An actor SIGKILLed in mid-shard: the same bytes, exit 0, a summary of ours and no word of Ray's, nothing left
    of its processes; a token of the environment is in none of theirs."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = plan_tiny(tmp_path / "run", **JOB)
    driver = RayDriver(run)
    driver.wait_busy()
    environments = {_told(process): process.environ() for process in driver.seen if process.is_running()}
    assert len(environments) > 4
    assert not [name for name, found in environments.items() if TOKEN in found.values() or TOKEN in name]
    driver.actors()[0].kill()
    code, out, err = driver.end()
    assert code == 0, err
    assert made(run) == undisturbed(**JOB)
    capsys.readouterr()
    assert main(["status", str(run.path)]) == 0
    assert out == capsys.readouterr().out
    lost = [line for line in err.splitlines() if line.startswith("shard ")]
    assert lost
    assert all(": worker " in line and " died" in line for line in lost)
    assert not [line for line in err.splitlines() if line not in lost and " images, " not in line], err
    logs = "".join((run.logs / f"worker-00{number}.log").read_text() for number in (0, 1))
    assert logs.count(" done: 8 of 8 rows, s: read ") == 15
    assert driver.no_orphan()


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stopped(
    plan_tiny: PlanTiny,
    undisturbed: Any,
    tmp_path: Path,
    sent: signal.Signals,
) -> None:
    """Begun by a local worker, gone on with by Ray and stopped there, finished by a local worker: the same bytes. The
    stop is exit 75 in one line, with nothing half-made and no process of Ray's left."""
    run = plan_tiny(tmp_path / "run", **JOB)
    Worker(run).make_shard(3)
    driver = RayDriver(run)
    driver.wait_busy()
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
    assert said == "--ray-address 'auto': value error, is for Ray alone; add --engine ray"
    said = complaint("resume", run, "--engine", "ray", "--ray-address", "ray://head:10001")
    assert said == "--ray-address 'ray://head:10001': value error, expected auto or host:port"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        said = complaint("resume", run, "--engine", "ray", "--ray-address", address, code=1)
    assert said == f"no Ray cluster at {address}: [Errno 111] Connection refused"
    monkeypatch.setitem(sys.modules, "ray", None)
    said = complaint("resume", run, "--engine", "ray")
    assert said == "--engine ray needs Ray, which is not installed; pip install 'boomgen[ray]'"


# What takes long ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_poison_shard(plan_tiny: PlanTiny, tmp_path: Path, boomgen: Any) -> None:
    """A shard that always fails is tried three times and named, the others are made."""
    (tmp_path / "images").mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
    run = plan_tiny(tmp_path / "run", dataset=str(tmp_path / "images"), shard_size=8)
    (tmp_path / "images" / "07.png").unlink()
    done = boomgen("resume", run.path, "--device", "cpu", "--workers", 1, "--engine", "ray", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    (missing,) = run.missing()
    *told, last = done.stderr.splitlines()
    assert last.startswith(f"boomgen: 1 shards failed 3 times and were set aside; shard {missing}: FileNotFoundError")
    assert [line.partition(":")[0] for line in told if line.startswith("shard ")] == [f"shard {missing}"] * 3
    assert (run.logs / "worker-000.log").read_text().count("Traceback") == 3
    assert list(run.staging.iterdir()) == []


@pytest.mark.slow
def test_foreign_class(plan_tiny: PlanTiny, tmp_path: Path, boomgen: Any) -> None:
    """Actors of another environment class are refused, with the setting named."""
    run = plan_tiny(tmp_path / "run")
    other = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    where = ("--device", "cpu", "--workers", 1, "--engine", "ray")
    done = boomgen("resume", run.path, *where, env=other, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("boomgen: this device is not of the planned class: cpu_capability ")
    assert len(run.missing()) == 7


@pytest.mark.slow
def test_hung(plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path) -> None:
    """An actor that stands still is killed and replaced."""
    run = plan_tiny(tmp_path / "run", **JOB)
    driver = RayDriver(run, "--patience", "6")
    driver.wait_busy()
    hung = driver.actors()[0]
    hung.suspend()
    code, _, err = driver.end()
    assert code == 0, err
    assert " hung and was killed" in err
    assert made(run) == undisturbed(**JOB)
    assert driver.no_orphan()


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


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes with a made-up GPU each, on addresses of this machine, and its second node. A lost one is
    noticed within seconds."""
    from ray.cluster_utils import Cluster

    short = tempfile.mkdtemp(dir="/tmp")
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Cluster writes its address, whatever it is told
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}
    first = {"include_dashboard": False, "temp_dir": short, "node_ip_address": "127.0.0.2"}
    first["_system_config"] = health | {"health_check_failure_threshold": 3}
    node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | first)
    try:
        yield cluster, cluster.add_node(**node, node_ip_address="127.0.0.3")
    finally:
        cluster.shutdown()
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.slow
def test_node_lost(plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boomgen: Any) -> None:
    """On a running cluster, one actor per GPU; a node that goes without grace costs its shard a try, and the cluster
    stays."""
    path = [str(MADEUP), str(MADEUP.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    job = plan_tiny(tmp_path / "cpu", **JOB).plan.job
    _, *options = command_line(job, tmp_path / "run", "--device", "cuda", verb="augment")
    boomgen("plan", "--mode", "augment", *options)
    run = RunDir(tmp_path / "run")
    with two_nodes() as (cluster, second):
        driver = Driver(run, "boomgen", "resume", str(run.path), "--engine", "ray", "--ray-address", cluster.address)
        driver.wait_published(1)
        driver.wait_for(lambda: _in_hand(run) == 2)
        cluster.remove_node(second, allow_graceful=False)
        code, _, err = driver.end()
        assert code == 0, err
        assert [line for line in err.splitlines() if "node was terminated unexpectedly" in line]
        assert len(cluster.list_all_nodes()) == 1
    assert run.missing() == []
    assert boomgen("verify", run.path, "--remake", 2).stdout.endswith("2 of them made again\n")
