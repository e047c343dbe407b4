"""Clusters of Ray's: what a dead driver left of its own, workers that find no place or no start, nodes that come."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from boomgen.cli import main
from boomgen.engines import ray_cluster
from boomgen.run import RunDir

from ..conftest import PlanTiny
from ..finished import made
from ..test_bytes import AUGMENT, Driver
from . import engines

JOB = AUGMENT | {"steps": 100}  # 15 shards of one batch
RAY = ("--engine", "ray", "--device", "cpu", "--workers")


def process(line: str, open_file: Path) -> psutil.Process:
    """One with this command line up to a blank, and a file open."""
    name, _, more = line.partition(" ")
    with open_file.open("w") as file:
        started = subprocess.Popen(
            [name, "-c", "import time; time.sleep(60)", more], executable=sys.executable, stdout=file
        )
    return psutil.Process(started.pid)


def test_only_what_dead_drivers_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "PLACE", str(tmp_path))
    dead, living, other = (tmp_path / f"boomgen-ray-{name}" for name in ("1-dead", "2-living", "of-somebody"))
    for folder in (dead, living, other):
        folder.mkdir()
    for folder in (dead, living):
        (folder / "token").touch()
    (tmp_path / "boomgen-ray-3-link").symlink_to(other)
    lock = ray_cluster._locked(living)
    ended = [process(f"/x/ray/gcs --log_dir={dead}/logs", tmp_path / "gcs"), process("ray::Agent", dead / "agent.log")]
    kept = [process(f"/usr/bin/tail {dead}/agent.log", dead / "agent.log"), process("ray::Agent", living / "agent.log")]
    try:
        time.sleep(0.2)
        ray_cluster._clear_away()
        _, alive = psutil.wait_procs(ended + kept, timeout=0.5)
        assert sorted(found.pid for found in alive) == [found.pid for found in kept]
        assert sorted(path.name for path in tmp_path.glob("boomgen-*")) == [
            living.name,
            "boomgen-ray-3-link",
            other.name,
        ]
    finally:
        os.close(lock)
        for found in kept:
            found.kill()


@contextlib.contextmanager
def driver(run: RunDir) -> Iterator[tuple[Driver, Any]]:
    """One that starts a cluster of its own, and what tells that cluster's folders."""
    going = Driver(run, "boomgen", "resume", str(run.path), *RAY, "2")
    try:
        yield going, lambda: list(Path("/tmp").glob(f"boomgen-ray-{going.process.pid}-*"))
    finally:
        going.process.kill()


def left(folders: list[Path]) -> list[str]:
    """Command lines of the processes that belong to a cluster's folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(ray_cluster._belongs(place, f"{folder}/") for folder in folders):
                found.append((place / "cmdline").read_bytes().decode())
    return found


@pytest.mark.slow
def test_nothing_outlives_a_driver_that_was_stopped_while_it_started_ray_or_killed_later(
    plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path
) -> None:
    """The stopped one clears away itself, what is left of the killed one is cleared away by the next."""
    run = plan_tiny(tmp_path / "run", **JOB)
    with driver(run) as (starting, folders):
        starting.wait_for(lambda: any("gcs_server" in line for line in left(folders())))
        stopped = folders()
        starting.process.send_signal(signal.SIGTERM)
        code, out, err = starting.end()
        assert (code, out) == (75, ""), err
    assert (folders(), left(stopped)) == ([], [])
    with driver(run) as (going, folders):
        going.wait_published(1)
        killed = folders()
        going.process.kill()
        going.end()
    assert folders() == killed
    assert left(killed)
    with driver(run) as (last, _):
        code, _, err = last.end()
    assert code == 0, err
    assert (folders(), left(killed)) == ([], [])
    assert made(run) == undisturbed(**JOB)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_cluster_that_lost_what_it_cannot_live_without_ends_the_run(
    plan_tiny: PlanTiny, tmp_path: Path, part: str
) -> None:
    """Ray itself waits for it, for ever."""
    run = plan_tiny(tmp_path / "run", **JOB)
    with driver(run) as (going, folders):
        going.wait_published(1)
        next(found for found in psutil.Process(going.process.pid).children() if found.name() == part).kill()
        code, out, err = going.end()
        assert (code, out) == (1, "")
        said = f"Ray's {part} was killed, and all workers with it; what is whole stays, go on with: boomgen resume "
        assert err.splitlines()[-1] == f"boomgen: {said}{run.path}"
        assert folders() == []


@pytest.mark.slow
def test_a_cluster_of_others_that_lost_its_head_ends_the_run(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Before Ray ends the process, in words of its own."""
    run = plan_tiny(tmp_path / "run", **JOB | {"variants": 90})  # minutes
    with engines.ray_cluster(engines.NODE) as cluster:
        address = cluster.address
        going = Driver(run, "boomgen", "resume", str(run.path), *RAY, "1", "--ray-address", address)
        going.wait_published(1)
        cluster.head_node.kill_gcs_server(check_alive=False)
        code, out, err = going.end()
    said = f"the head of the Ray cluster at {address} is gone, and all workers with it; what is whole stays"
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"boomgen: {said}, go on with: boomgen resume {run.path}"


@pytest.mark.slow
def test_workers_that_die_while_starting(plan_tiny: PlanTiny, tmp_path: Path, boomgen: Any) -> None:
    """Of two that cannot write their logs, the run ends; of one, the other makes all."""
    run = plan_tiny(tmp_path / "run")
    logs = [run.logs / f"worker-00{number}.log" for number in (0, 1)]
    for log in logs:
        log.mkdir(parents=True)
    done = boomgen("resume", run.path, *RAY, 2, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    *gone, last = done.stderr.splitlines()
    name = [f"worker {number} (cpu of {socket.gethostname()})" for number in (0, 1)]
    gone = [line for line in gone if " images, " not in line]  # of a slow start
    assert [line.endswith("; the others go on") for line in gone] == [True], done.stderr
    assert gone[0].startswith(tuple(f"{who} dies while starting; see {run.logs}" for who in name))
    assert last.startswith("boomgen: workers die while starting (died: IsADirectoryError: [Errno 21]")
    logs[1].rmdir()
    done = boomgen("resume", run.path, *RAY, 2)
    assert f"{name[0]} dies while starting; see {logs[0]}; the others go on" in done.stderr.splitlines()
    assert main(["verify", str(run.path)]) == 0


@pytest.mark.slow
def test_a_node_of_another_class_leaves_the_work_to_the_others(
    plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, boomgen: Any
) -> None:
    """Ray packs all workers onto it; each is named once, and others begin elsewhere, so that there are as many. Where
    all nodes are, the run ends: the suite's foreign environment."""
    run, foreign = plan_tiny(tmp_path / "run", **JOB), {"ATEN_CPU_CAPABILITY": "default"}
    right, wrong = engines.NODE | {"num_cpus": 2}, engines.NODE | {"num_cpus": 4, "env_vars": foreign}
    with engines.ray_cluster(wrong) as cluster:
        cluster.add_node(**right, node_ip_address="127.0.0.3")
        there = os.environ | {"RAY_ADDRESS": cluster.address}
        done = boomgen("resume", run.path, *RAY, 2, "--ray-address", "auto", env=there)
        told = [line for line in done.stderr.splitlines() if "not of the planned class" in line]
        names = [rf"worker {number} \(cpu of {socket.gethostname()}\)" for number in (0, 1)]
        for name, line in zip(names, sorted(told), strict=True):
            assert re.fullmatch(rf"{name}: this device .*\(here DEFAULT\).*; the others go on", line)
        assert (run.logs / "lost.log").read_text().count("not of the planned class") == 2
        for number in (0, 1):
            assert " done: " in (run.logs / f"worker-{number:03d}.log").read_text()
        assert made(run) == undisturbed(**JOB)
