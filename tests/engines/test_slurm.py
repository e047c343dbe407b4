"""SLURM: what the scripts say, whatever is asked. What a real SLURM makes of them is in test_slurm_real."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from boomgen import catalog
from boomgen.cli import main
from boomgen.engines import slurm as slurm_engine
from boomgen.engines.slurm import Scripts, SlurmOptions, requeue, scripts
from boomgen.errors import BoomgenError, UsageError

from ..conftest import Complaint, PlanTiny
from ..driver import Driver
from ..finished import finish
from ..test_bytes import LONG

HOSTILE = ["a b", "$(touch x)", "`touch x`", "';touch x;'", '"', "%j %% 100%", "#SBATCH --wrap=x", "-n", "é ∕ {run}"]


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
    """Runs a script by bash, with a Python (and an apptainer) that only tells how it was called. One of four
    tasks submitted it; no worker may take itself for one of these."""
    (tmp_path / "bin").mkdir()
    teller = tmp_path / "bin" / "apptainer"
    teller.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps(sys.argv[1:]))\n"
        "assert 'SLURM_STEP_NUM_TASKS' not in os.environ\n"
    )
    teller.chmod(0o755)
    shutil.copy(teller, tmp_path / "bin" / "a $(touch x) python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "a $(touch x) python"))

    def run(script: str, element: int = 0) -> list[str]:
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(element)}
        env["SLURM_STEP_NUM_TASKS"] = "4"
        done = subprocess.run(
            ["bash"], input=script, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stderr == ""
        assert not (tmp_path / "x").exists()
        return list(json.loads(done.stdout.splitlines()[-1]))

    return run


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
        ({"sbatch": "--exclude=n17,n23 --nice"}, {"exclude": "n17,n23", "nice": ""}),
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
    shared = {name: value for name, value in written.items() if name not in ("array", "gres")}
    assert shared.items() <= directives(closing).items()


def test_a_cluster_without_arrays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_engine, "_ask", lambda *_: "MaxArraySize            = 0\nMaxBatchRequeue         = 5")
    with pytest.raises(BoomgenError, match=r"^this cluster takes no arrays \(MaxArraySize 0\); take slurm/"):
        slurm_engine.max_array_size()


TOO_SHORT = "expected more than 2 minutes, since so long before it workers are warned"


@pytest.mark.parametrize("limit", ["0", "3", "2:01", "0:02:01", "0-1", "1-0:00", "0-0:03", "0-0:02:01"])
def test_longer_limits_and_none_are_taken(limit: str) -> None:
    assert SlurmOptions(time=limit).time == limit


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("time", "abc", "expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        ("time", "1:2:3", "expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"),
        *[("time", limit, TOO_SHORT) for limit in ("1", "2", "1:59", "0:02:00", "0-0:02")],
        ("partition", "a b", "expected a partition's name, or several with commas between them"),
        ("account", "a\n#SBATCH --wrap=x", "expected an account's name"),
        ("gres", "gpu one", "expected devices such as gpu:1 or gpu:a100:1, or none"),
        ("mem", "lots", "expected a number and K, M, G or T, such as 16G"),
        ("sbatch", "exclude=n1", "expected --NAME=VALUE, with a space before the next"),
        ("sbatch", "--nice\necho", "expected --NAME=VALUE, with a space before the next"),
        ("container", "", "no such image; expected a file, or an address such as docker://owner/name"),
        ("container", "no.sif", "no such image; expected a file, or an address such as docker://owner/name"),
    ],
)
def test_what_sbatch_would_refuse_is_refused(
    plan_tiny: PlanTiny, complaint: Complaint, tmp_path: Path, option: str, value: str, why: str
) -> None:
    run = plan_tiny(tmp_path / "run")
    assert complaint("slurm", run.path, f"--{option}={value}") == f"--{option} {value!r}: {why}"


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_names(name: str, tmp_path: Path, stand_in: Any) -> None:
    run = tmp_path / name
    (array,), closing = texts(run, device="cuda")
    assert stand_in(array, 5) == ["-m", "boomgen", "work", str(run), "--part", "5/7", "--device", "cuda"]
    assert stand_in(closing) == ["-m", "boomgen", "finalise", str(run)]
    assert directives(array)["output"] == f"{str(run).replace('%', '%%')}/logs/slurm-%A_%a.log"


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\rb", "a\x1b[2J", os.fsdecode(b"\xff")])
def test_names_that_no_script_should_hold(name: str) -> None:
    with pytest.raises(UsageError, match="holds a line break, backslash or control character; expected a plainer name"):
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


def test_a_container_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    """However soon it is gone: of 50 starts, in each."""
    (array,), _ = texts(container="docker://owner/name")
    (tmp_path / "apptainer").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "apptainer").chmod(0o755)
    for path, code in ((tmp_path, 3), (tmp_path / "none", 127)):
        env = {"PATH": f"{path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "0"}
        many = f"for i in {{1..50}}; do ( {array}\n ) ; echo $?; done"
        done = subprocess.run(["bash", "-c", many], env=env, capture_output=True, text=True, check=True, timeout=60)
        assert [line for line in done.stdout.splitlines() if line.isdecimal()] == [str(code)] * 50


@pytest.mark.parametrize("name", ["ray.sbatch", "accelerate.sbatch"])
def test_the_shipped_documents_are_scripts(name: str) -> None:
    script = catalog.shipped("slurm") / name
    subprocess.run(["bash", "-n", script], check=True)
    assert {"nodes", "ntasks-per-node", "mem"} <= directives(script.read_text()).keys()
    assert '\nexport SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" ' in script.read_text()  # else one core is bound


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
    assert not requeue(progress=True)
    asks = "from boomgen.engines.slurm import requeue; print(requeue(progress=False))"
    env = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "PATH": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", asks], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    why = "scontrol: No such file or directory; expected a machine where SLURM's commands are"
    assert done.stderr == f"not requeued: {why}\n"


NEVER = {"steps": 1000, "shard_size": 100}  # one shard, whose time no test waits for


@pytest.mark.parametrize(
    ("job", "whole", "code", "said"),
    [
        (LONG, 1, 75, "boomgen: stopped (SIGUSR1); what is whole stays"),
        (NEVER, 0, 1, "boomgen: no shard became whole in start 2 of this element; give a longer --time, "),
    ],
    ids=["progress", "none"],
)
def test_an_element_that_makes_no_progress_is_not_requeued_again(
    plan_tiny: PlanTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Any, whole: int, code: int, said: str
) -> None:
    """Else it would be for ever, where a time limit is shorter than a shard, and nothing would close the run."""
    run = plan_tiny(tmp_path / "run", **job)
    for name, value in {"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "0", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    going = Driver(run, "boomgen", "work", str(run.path), "--part", "0/1")
    going.wait_for(lambda: len(run.published()) >= whole and any(run.staging.glob("*")))
    going.process.send_signal(signal.SIGUSR1)
    ended, _, err = going.end()
    assert ended == code, err
    assert err.splitlines()[-1].startswith(said)
    assert ("not requeued: scontrol: No such file" in err) == (code == 75)
    assert not list(run.staging.iterdir())
