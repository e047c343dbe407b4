"""SLURM: what the scripts say, whatever is asked, and what a real SLURM makes of them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from boomgen import catalog
from boomgen.cli import main
from boomgen.engines.slurm import Scripts, SlurmOptions, requeue, scripts
from boomgen.errors import UsageError
from boomgen.run import RunDir
from boomgen.verify import verify
from boomgen.worker import Worker

from ..conftest import Complaint, PlanTiny
from ..finished import finish, made
from ..test_bytes import LONG
from .slurm_cluster import Cluster, slurm_cluster

HOSTILE = ["a b", "$(touch x)", "`touch x`", "';touch x;'", '"\\', "%j %% 100%", "#SBATCH --wrap=x", "-n", "é ∕ {run}"]


def directives(script: str) -> dict[str, str]:
    """What a script asks of SLURM."""
    lines = [
        line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if line.startswith("#SBATCH")
    ]
    return {name: shlex.split(value)[0] if value else "" for name, _, value in lines}


def texts(run: Path | str = "/run", shards: int = 7, missing: Any = None, device: str = "cpu", **more: Any) -> Scripts:
    largest = more.pop("largest", 1001)
    missing = range(shards) if missing is None else missing
    return scripts(Path(run), shards, missing, device, SlurmOptions(**more), largest)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a script by bash, with a Python (and an apptainer) that only tells how it was called."""
    (tmp_path / "bin").mkdir()
    teller = tmp_path / "bin" / "apptainer"
    teller.write_text(f"#!{sys.executable}\nimport json, sys; print(json.dumps(sys.argv[1:]))\n")
    teller.chmod(0o755)
    shutil.copy(teller, tmp_path / "bin" / "a $(touch x) python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "a $(touch x) python"))

    def run(script: str, element: int = 0) -> list[str]:
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(element)}
        done = subprocess.run(
            ["bash"], input=script, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == ""
        assert not (tmp_path / "x").exists()
        return list(json.loads(done.stdout.splitlines()[-1]))

    return run


# What the scripts say ----------------------------------------------------------------------------------------------


def test_what_an_array_asks_for() -> None:
    (array,), closing = texts()
    assert directives(array) == {
        "job-name": "boomgen-run",
        "array": "0-6",
        "output": "/run/logs/slurm-%A_%a.log",
        "ntasks": "1",
        "cpus-per-task": "4",
        "mem": "16G",
        "requeue": "",
        "open-mode": "append",
        "signal": "B:USR1@120",
    }
    assert shlex.split(array.splitlines()[-1]) == [
        *("exec", sys.executable, "-m", "boomgen", "work", "/run", "--part", "$part/7", "--device", "cpu")
    ]
    assert directives(closing) == {
        "job-name": "boomgen-run",
        "output": "/run/finalise-%j.log",
        "ntasks": "1",
        "cpus-per-task": "1",
        "mem": "16G",
    }
    assert shlex.split(closing.splitlines()[-1]) == ["exec", sys.executable, "-m", "boomgen", "finalise", "/run"]


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({"time": "1-12:00:00"}, {"time": "1-12:00:00"}),
        ({"partition": "long,gpu-a100"}, {"partition": "long,gpu-a100"}),
        ({"account": "lab@x", "mem": "500M", "cpus_per_task": 2}, {"account": "lab@x", "mem": "500M"}),
        ({"device": "cuda"}, {"gres": "gpu:1"}),
        ({"device": "cuda", "gres": "gpu:a100:1"}, {"gres": "gpu:a100:1"}),
        ({"device": "cuda", "gres": "none"}, {"gres": "none"}),
        ({"array_size": 3}, {"array": "0-2"}),
        ({"array_size": 1}, {"array": "0"}),
        ({"missing": [1, 5, 6]}, {"array": "1,5-6"}),
        ({"missing": [1, 5, 6], "array_size": 4}, {"array": "1-2"}),
    ],
)
def test_what_is_asked_is_written(asked: dict[str, Any], written: dict[str, str]) -> None:
    (array,), closing = texts(**asked)
    assert written.items() <= directives(array).items()
    assert "gres" not in directives(closing)
    shared = {name: value for name, value in written.items() if name in ("time", "partition", "account", "mem")}
    assert shared.items() <= directives(closing).items()


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("time", "abc", "expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        ("time", "1:2:3", "expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        ("partition", "a b", "expected a partition's name, or several with commas between them"),
        ("account", "a\n#SBATCH --wrap=x", "expected an account's name"),
        ("gres", "gpu one", "expected devices such as gpu:1 or gpu:a100:1, or none"),
        ("mem", "lots", "expected a number and K, M, G or T, such as 16G"),
        ("container", "no.sif", "no such image; expected a file, or an address such as docker://owner/name"),
    ],
)
def test_what_sbatch_would_refuse_is_refused(
    plan_tiny: PlanTiny, complaint: Complaint, tmp_path: Path, option: str, value: str, why: str
) -> None:
    run = plan_tiny(tmp_path / "run")
    assert complaint("slurm", run.path, f"--{option}", value) == f"--{option} {value!r}: value error, {why}"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_names(name: str, tmp_path: Path, stand_in: Any) -> None:
    run = tmp_path / name
    (array,), closing = texts(run, device="cuda")
    assert stand_in(array, 5) == ["-m", "boomgen", "work", str(run), "--part", "5/7", "--device", "cuda"]
    assert stand_in(closing) == ["-m", "boomgen", "finalise", str(run)]
    assert directives(array)["output"] == f"{str(run).replace('%', '%%')}/logs/slurm-%A_%a.log"


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2J", os.fsdecode(b"\xff")])
def test_names_that_no_script_should_hold(name: str) -> None:
    with pytest.raises(UsageError, match=r"has a line break or control character; expected a name that a script can"):
        texts(f"/{name}")


def test_arrays_above_the_largest_are_split(stand_in: Any) -> None:
    arrays, _ = texts(shards=30, array_size=25, largest=11, missing=range(1, 30))
    assert [directives(array)["array"] for array in arrays] == ["0-10", "0-10", "0-2"]
    assert [stand_in(array, 2)[5] for array in arrays] == ["2/25", "13/25", "24/25"]
    arrays, _ = texts(shards=25, array_size=25, largest=11, missing=[3, 24])
    assert [(directives(array)["array"], stand_in(array, 2)[5]) for array in arrays] == [("3", "2/25"), ("2", "24/25")]


def test_an_image_is_run_by_apptainer(tmp_path: Path, stand_in: Any) -> None:
    image = tmp_path / "my image.sif"
    image.touch()
    for device, more in (("cpu", []), ("cuda", ["--nv"])):
        (array,), closing = texts(device=device, container=str(image))
        start = ["exec", *more, str(image), "boomgen"]
        assert stand_in(array, 3) == [*start, "work", "/run", "--part", "3/7", "--device", device]
        assert stand_in(closing) == [*start, "finalise", "/run"]


@pytest.mark.parametrize("name", ["ray.sbatch", "accelerate.sbatch"])
def test_the_shipped_documents_are_scripts(name: str) -> None:
    script = catalog.shipped("slurm") / name
    subprocess.run(["bash", "-n", script], check=True)
    assert {"nodes", "ntasks-per-node", "mem"} <= directives(script.read_text()).keys()


def test_only_what_is_missing_is_printed(
    plan_tiny: PlanTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finish(plan_tiny(tmp_path / "run"))
    assert main(["slurm", str(run.path)]) == 0
    assert capsys.readouterr().out == f"# {run.path} is whole and closed: there is nothing to submit\n"
    for number in (2, 3, 5, 6):
        shutil.rmtree(run.shard(number))
    for asked, expected in [((), "2-3,5-6"), (("--array-size", "4"), "1-3")]:
        assert main(["slurm", str(run.path), *asked]) == 0
        printed = capsys.readouterr().out
        assert directives(printed)["array"] == expected
        subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


def test_only_an_element_of_an_array_is_requeued(tmp_path: Path) -> None:
    """And a machine that cannot ask says so."""
    assert not requeue()
    asks = "from boomgen.engines.slurm import requeue; print(requeue())"
    env = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "PATH": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", asks], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    why = "scontrol: No such file or directory; expected a machine where SLURM's commands are"
    assert done.stderr == f"not requeued: {why}\n"


# A real SLURM ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A machine without SLURM fails, since a skipped proof proves nothing."""
    if not shutil.which("slurmctld"):
        pytest.fail("SLURM is missing: apt-get install --no-install-recommends slurm-wlm munge", pytrace=False)
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


real = pytest.mark.xdist_group("slurm")
Submit = Callable[..., tuple[list[str], str]]


@pytest.fixture
def submit(cluster: Cluster, boomgen: Any) -> Submit:
    """Submit a run as a user does: the arrays, and the job that closes it."""

    def of(run: RunDir, *more: Any) -> tuple[list[str], str]:
        small = ("--array-size", 2, "--cpus-per-task", 1, "--mem", "2G")
        done = boomgen("slurm", run.path, "--submit", *small, *more, env=cluster.env | {"OMP_NUM_THREADS": "1"})
        *arrays, closing, _ = (line.split()[1] for line in done.stdout.splitlines())
        return arrays, closing

    return of


def log(run: RunDir, name: str) -> str:
    return (run.path / name).read_text()


def whole(run: RunDir, expected: Any) -> None:
    """Closed, sound, and the bytes of one worker's run here."""
    assert made(run) == expected(**LONG)
    assert not run.staging.exists()
    assert not list(verify(RunDir(run.path)))


def in_mid_shard(cluster: Cluster, run: RunDir) -> None:
    cluster.wait_for(lambda: len(run.published()) >= 2 and any(run.staging.iterdir()))


def worker_of(run: RunDir, part: str) -> int:
    """The process that makes a part."""
    lines = {int(place.parent.name): place.read_bytes() for place in Path("/proc").glob("[0-9]*/cmdline")}
    (pid,) = [pid for pid, line in lines.items() if {str(run.path).encode(), part.encode()} <= set(line.split(b"\0"))]
    return pid


@real
@pytest.mark.slow
def test_an_array_makes_the_bytes_of_one_worker(
    cluster: Cluster, submit: Submit, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path
) -> None:
    run = plan_tiny(tmp_path / "run", **LONG)
    (array,), closing = submit(run)
    assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    assert cluster.states(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED"}
    whole(run, undisturbed)
    assert log(run, f"logs/slurm-{array}_1.log").startswith("part 1/2 on n")
    assert "shards    13 of 13 whole" in log(run, f"finalise-{closing}.log")


@real
def test_a_killed_worker_is_told_of_and_made_good(
    cluster: Cluster, submit: Submit, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, capsys: Any
) -> None:
    """In a run whose name means something to a shell and to SLURM."""
    run = plan_tiny(tmp_path / "a $(touch x) 'run' 100% %j #1", **LONG)
    (array,), closing = submit(run)
    in_mid_shard(cluster, run)
    os.kill(worker_of(run, "1/2"), signal.SIGKILL)
    assert cluster.wait_ended(closing) == {closing: "FAILED"}
    assert cluster.states(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "FAILED"}
    assert cluster.told(f"{array}_1", "ExitCode") == "0:9"
    assert cluster.told(closing, "ExitCode") == "1:0"
    missing = run.missing()
    assert {number % 2 for number in missing} == {1}
    assert f"boomgen: {len(missing)} of 13 shards are missing" in log(run, f"finalise-{closing}.log")
    capsys.readouterr()
    assert main(["slurm", str(run.path), "--array-size", "2"]) == 0
    assert directives(capsys.readouterr().out)["array"] == "1"
    (array,), closing = submit(run)
    assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    assert cluster.states(array) == {f"{array}_1": "COMPLETED"}
    whole(run, undisturbed)


@real
def test_a_cancelled_array_leaves_nothing_half_made_and_is_resumed_here(
    cluster: Cluster, submit: Submit, boomgen: Any, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path
) -> None:
    run = plan_tiny(tmp_path / "run", **LONG)
    (array,), closing = submit(run)
    in_mid_shard(cluster, run)
    cluster.run("scancel", array)
    assert cluster.wait_ended(closing) == {closing: "FAILED"}
    assert set(cluster.wait_ended(array).values()) == {"CANCELLED"}
    assert list(run.staging.iterdir()) == []
    assert run.missing()
    assert "stopped (SIGTERM)" in log(run, f"logs/slurm-{array}_0.log")
    boomgen("resume", run.path, "--device", "cpu", "--workers", 1)
    whole(run, undisturbed)


@real
@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True])
def test_the_warning_before_the_end_of_time_requeues(
    cluster: Cluster, submit: Submit, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, image: bool
) -> None:
    """The worker drops its batch, and its element alone runs again. Also where the worker is in an image, of which a
    stand-in for apptainer has none."""
    run = plan_tiny(tmp_path / "run", **LONG)
    more: list[Any] = []
    if image:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "apptainer").write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} -m boomgen "$@"\n')
        (tmp_path / "bin" / "apptainer").chmod(0o755)
        more = ["--container", tmp_path / "bin"]
        cluster.env["PATH"] = f"{tmp_path / 'bin'}:{cluster.env['PATH']}"
    (array,), closing = submit(run, *more)
    in_mid_shard(cluster, run)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{array}_0")
    cluster.wait_for(lambda: cluster.states(array)[f"{array}_0"] == "PENDING")
    assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    assert cluster.states(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED"}
    whole(run, undisturbed)
    said = log(run, f"logs/slurm-{array}_0.log")
    assert re.findall(r"^part 0/2 on n\d, start (\d)$", said, re.MULTILINE) == ["1", "2"]
    assert f"stopped ({'SIGTERM' if image else 'SIGUSR1'})" in said
    assert "start 2" not in log(run, f"logs/slurm-{array}_1.log")


@real
@pytest.mark.slow
def test_a_lost_node_s_work_is_done_by_another(
    cluster: Cluster, submit: Submit, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path
) -> None:
    run = plan_tiny(tmp_path / "run", **LONG)
    (array,), closing = submit(run)
    in_mid_shard(cluster, run)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    try:
        assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume", check=False)
    whole(run, undisturbed)
    assert any("start 2" in log(run, f"logs/slurm-{array}_{element}.log") for element in range(2))


@real
@pytest.mark.slow
def test_more_elements_than_an_array_can_have_are_several_arrays(
    cluster: Cluster, submit: Submit, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path
) -> None:
    """The cluster has a MaxArraySize of 11, and each of 13 shards its element; two have something to do."""
    run = plan_tiny(tmp_path / "run", **LONG)
    worker = Worker(run)
    for number in set(range(13)) - {2, 12}:
        worker.make_shard(number)
    arrays, closing = submit(run, "--array-size", 13)
    assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    assert [cluster.states(array) for array in arrays] == [
        {f"{array}_{element}": "COMPLETED"} for array, element in zip(arrays, (2, 1), strict=True)
    ]
    whole(run, undisturbed)


@real
def test_what_sbatch_refuses_is_one_line(
    cluster: Cluster, plan_tiny: PlanTiny, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan_tiny(tmp_path / "run")
    run.logs.mkdir()
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    said = complaint("slurm", run.path, "--submit", "--partition", "no-such", code=1)
    assert said == (
        "sbatch: error: invalid partition specified: no-such sbatch: error: Batch job submission failed: Invalid "
        "partition name specified; mend that and submit again with boomgen slurm"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    said = complaint("slurm", run.path, "--submit", code=1)
    assert said == "scontrol: No such file or directory; expected a machine where SLURM's commands are"
