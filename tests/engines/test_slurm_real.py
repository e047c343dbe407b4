"""What a real SLURM makes of the scripts, beyond what all engines bear (test_conformance): signals, names, limits."""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boomgen import catalog
from boomgen.engines.slurm import Scripts
from boomgen.engines.slurm import submit as submit_scripts
from boomgen.errors import BoomgenError
from boomgen.run import RunDir
from boomgen.verify import verify
from boomgen.worker import Worker

from ..conftest import Complaint, PlanTiny
from ..finished import made
from ..test_bytes import LONG
from .engines import Slurm
from .slurm_cluster import Cluster
from .test_slurm import HOSTILE, NEVER, texts

Submit = Callable[..., tuple[list[str], str]]
Image = Callable[[str], tuple[str, Path]]


@pytest.fixture
def submit(slurm: Slurm) -> Submit:
    """Submit a run as a user does: the arrays, and the job that closes it."""

    def of(run: RunDir, *more: Any) -> tuple[list[str], str]:
        *arrays, closing, _ = (line.split()[1] for line in slurm.submit(run, *more).splitlines())
        return arrays, closing

    return of


@pytest.fixture
def image(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    """A stand-in for apptainer on the nodes, which runs this in place of an image's boomgen; the options that use it.

    As an image, it holds nothing of SLURM.
    """

    def of(command: str) -> tuple[str, Path]:
        program = tmp_path / "bin" / "apptainer"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\nshift 3\nPATH=/no/scontrol exec {command} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setitem(cluster.env, "PATH", f"{program.parent}:{os.environ['PATH']}")
        return "--container", program.parent

    return of


def warn(cluster: Cluster, element: str) -> None:
    """As SLURM does before the end of time."""
    cluster.run("scancel", "--signal=USR1", "--batch", element)


def log(run: RunDir, name: str) -> str:
    return (run.path / name).read_text()


def whole(run: RunDir, expected: Any) -> None:
    """Closed, sound, and the bytes of one worker's run here."""
    assert made(run) == expected(**LONG)
    assert not run.staging.exists()
    assert not list(verify(RunDir(run.path)))


def in_mid_shard(cluster: Cluster, run: RunDir) -> None:
    cluster.wait_for(lambda: len(run.published()) >= 2 and any(run.staging.iterdir()))


def test_what_a_job_says_is_in_its_run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the run is called: sbatch reads quotes, and then signs for numbers, in the name of a log."""
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    jobs = {}
    for place, name in enumerate(HOSTILE):
        run, script = tmp_path / name, tmp_path / f"{place}.sbatch"
        run.mkdir()
        script.write_text(texts(run, mem="100M").closing)
        jobs[cluster.run("sbatch", "--parsable", script).strip()] = run
    for job, run in jobs.items():
        assert cluster.wait_ended(job) == {job: "COMPLETED"}
        assert (run / f"finalise-{job}.log").read_text() == f"-m boomgen finalise {run}\n"


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("where", ["here", "in an image"])
def test_the_warning_before_the_end_of_time_requeues(
    cluster: Cluster, submit: Submit, image: Image, plan_tiny: PlanTiny, undisturbed: Any, tmp_path: Path, where: str
) -> None:
    """The worker drops its batch, and its element alone runs again, once."""
    run = plan_tiny(tmp_path / "run", **LONG)
    before = cluster.exits()
    (array,), closing = submit(run, *(image(f"{sys.executable} -m boomgen") if where == "in an image" else ()))
    in_mid_shard(cluster, run)
    warn(cluster, f"{array}_0")
    cluster.wait_for(lambda: cluster.states(array)[f"{array}_0"] == "PENDING")
    assert cluster.wait_ended(closing) == {closing: "COMPLETED"}
    assert cluster.states(array) == {f"{array}_0": "COMPLETED", f"{array}_1": "COMPLETED"}
    assert cluster.exits() - before == {75: 1, 0: 3}  # the element's two starts, the other, the closing job
    whole(run, undisturbed)
    said = log(run, f"logs/slurm-{array}_0.log")
    assert re.findall(r"^part 0/2 on n\d, start (\d)$", said, re.MULTILINE) == ["1", "2"]
    following = "requeued, " if where == "here" else ""  # of an image, the script requeues after its worker
    assert f"stopped (SIGUSR1); {following}what is whole stays" in said
    assert "not requeued" not in said
    assert "start 2" not in log(run, f"logs/slurm-{array}_1.log")


@pytest.mark.slow
def test_an_element_that_makes_no_progress_ends_and_the_closing_job_tells(
    cluster: Cluster, submit: Submit, image: Image, plan_tiny: PlanTiny, tmp_path: Path
) -> None:
    """The first start may have waited for a cold cache; in the second, the time limit is shorter than a shard."""
    run = plan_tiny(tmp_path / "run", **NEVER)
    (array,), closing = submit(run, *image(f"{sys.executable} -m boomgen"))
    for state in ("PENDING", "FAILED"):
        cluster.wait_for(lambda: any(run.staging.glob("*")))
        warn(cluster, f"{array}_0")
        cluster.wait_for(lambda now=state: cluster.states(array)[f"{array}_0"] == now)
    assert cluster.wait_ended(closing) == {closing: "FAILED"}
    assert "no shard became whole in start 2 of this element; " in log(run, f"logs/slurm-{array}_0.log")
    assert "1 of 1 shards are missing" in log(run, f"finalise-{closing}.log")


def test_devices_that_are_asked_for_reach_a_worker(
    cluster: Cluster, submit: Submit, image: Image, plan_tiny: PlanTiny, tmp_path: Path
) -> None:
    run = plan_tiny(tmp_path / "run")
    for gres, seen in (("gpu:1", "start 1\n0\n"), ("none", "start 1\n")):
        (array,), closing = submit(run, "--gres", gres, *image("/usr/bin/printenv CUDA_VISIBLE_DEVICES #"))
        cluster.wait_ended(closing)
        assert log(run, f"logs/slurm-{array}_1.log").endswith(seen)


def test_an_image_that_does_not_start_fails_its_element(
    cluster: Cluster, submit: Submit, image: Image, plan_tiny: PlanTiny, tmp_path: Path
) -> None:
    run = plan_tiny(tmp_path / "run")
    (array,), closing = submit(run, *image("/no/such/program"))
    assert cluster.wait_ended(closing) == {closing: "FAILED"}
    assert cluster.states(array) == {f"{array}_0": "FAILED", f"{array}_1": "FAILED"}


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


PRIVATE_RAY = """#!/bin/sh
# `ray stop` ends all Ray of this machine, and symmetric-run wants none: here they see their own processes alone
PATH={bin}:$PATH exec unshare --user --map-root-user --pid --fork --kill-child --mount-proc \\
    bash -c 'ray "$@"; exit $?' ray "$@"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "said"),
    [
        ("accelerate", 2, ["worker 0 of 2: 7 shards on cpu", "worker 1 of 2: 6 shards on cpu"]),
        ("ray", 1, ["Head node started.", "Running command on head node"]),  # two nodes here would share an address
    ],
)
def test_the_shipped_documents_make_a_run(
    cluster: Cluster,
    plan_tiny: PlanTiny,
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    nodes: int,
    said: list[str],
) -> None:
    """As they are, but for the size of the job."""
    run, programs = plan_tiny(tmp_path / "run", **LONG), Path(sys.executable).parent
    (tmp_path / "ray").write_text(PRIVATE_RAY.format(bin=programs))
    (tmp_path / "ray").chmod(0o755)
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as short:  # of Ray's sockets
        more = {"PATH": f"{tmp_path}:{programs}:{os.environ['PATH']}", "RAY_TMPDIR": short, "OMP_NUM_THREADS": "1"}
        for variable, value in more.items():
            monkeypatch.setitem(cluster.env, variable, value)
        size = [f"--nodes={nodes}", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=4G", "--time=10"]
        script = catalog.shipped("slurm") / f"{name}.sbatch"
        where = f"--output={tmp_path / 'job.log'}"
        job = cluster.run("sbatch", "--parsable", *size, where, script, run.path).strip()
        assert cluster.wait_ended(job) == {job: "COMPLETED"}, (tmp_path / "job.log").read_text()
    assert [words for words in said if words not in (tmp_path / "job.log").read_text()] == []
    whole(run, undisturbed)


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


def test_an_array_stays_where_only_the_closing_job_is_refused(
    cluster: Cluster, plan_tiny: PlanTiny, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partition takes only jobs with a GPU: submitting again would be refused for ever."""
    run = plan_tiny(tmp_path / "run")
    run.logs.mkdir()
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setattr(sys, "executable", "/bin/true")
    asked = ("--partition", "gpus", "--gres", "gpu:1", "--array-size", 1, "--cpus-per-task", 1, "--mem", "1G")
    said = complaint("slurm", run.path, "--submit", *asked, code=1)
    array = said.split()[1]
    assert said == (
        f"array {array} is submitted, but not the job that closes the run: sbatch: error: only jobs with a GPU sbatch: "
        f"error: Batch job submission failed: Unspecified error; when it has ended: boomgen finalise {run.path}"
    )
    assert cluster.wait_ended(array) == {f"{array}_0": "COMPLETED"}


def test_the_closing_job_waits_for_all_arrays_and_of_several_all_or_none_are_submitted(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, closing = texts(tmp_path, mem="1G", array_size=1)
    later = [
        "#!/bin/bash\n#SBATCH --hold --output=/dev/null\n" + text.partition("\n")[2] for text in (*arrays, closing)
    ]
    refused = arrays[0].replace("#SBATCH", "#SBATCH --partition=no-such\n#SBATCH", 1)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    said = submit_scripts(Scripts([later[0]] * 2, later[1]), tmp_path)
    first, second, waiting = (line.split()[1] for line in said.splitlines()[:3])
    assert cluster.told(waiting, "Dependency") == f"afterany:{first}_*(unfulfilled),afterany:{second}_*(unfulfilled)"
    assert "KillOInInvalidDependent=Yes" in cluster.run("scontrol", "show", "job", waiting)
    cluster.run("scancel", first, second, waiting)
    before = set(cluster.run("squeue", "-hrtall", "-o%i").split())
    with pytest.raises(BoomgenError, match="Invalid partition name specified; mend that and submit again with"):
        submit_scripts(Scripts([later[0], refused], closing), tmp_path)
    (job,) = set(cluster.run("squeue", "-hrtall", "-o%i").split()) - before
    assert cluster.wait_ended(job) == {job: "CANCELLED"}


def test_what_a_script_says_counts_more_than_sbatch_s_variables(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many sites a profile sets some; sbatch itself heeds them first. Those that no option says are heeded."""
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    undone = {"TIMELIMIT": "5", "PARTITION": "gpus", "NO_REQUEUE": "1", "OUTPUT": "/dev/null", "SIGNAL": "INT@1"}
    for name, value in (undone | {"ARRAY_INX": "0-999", "JOB_NAME": "x", "ACCOUNT": "heeded"}).items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    asked = texts(tmp_path, time="1:00:00", partition="main", mem="1G", array_size=2, sbatch="--hold --exclude=n2")
    job, closing = (line.split()[1] for line in submit_scripts(asked, tmp_path).splitlines()[:2])
    found = cluster.run("scontrol", "show", "job", job)
    cluster.run("scancel", job, closing)
    for said in (
        "TimeLimit=01:00:00",
        "Partition=main",
        "Requeue=1",
        "ExcNodeList=n2",
        "ArrayTaskId=0-1",
        "Account=heeded",
    ):
        assert said in found
    assert f"StdOut={tmp_path}/logs/slurm-" in found
