"""A run folder that is opened again: left alone, gone on with, or refused with what differs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from boomgen import env
from boomgen.cli import main
from boomgen.run import RunDir
from boomgen.shard import unseal
from boomgen.verify import verify

from .conftest import PlanTiny
from .finished import command_line, finish, tree


def test_finished_run_is_left_alone(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Resuming a finished run exits 0, loads no torch and changes no file."""
    run = finish(plan_tiny(tmp_path / "run"))
    before = tree(run.path)
    code = (
        "import sys; from boomgen.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules and 9))"
    )
    subprocess.run([sys.executable, "-c", code, "resume", str(run.path)], check=True, capture_output=True)
    assert tree(run.path) == before


def test_other_settings_are_refused(
    plan_tiny: PlanTiny, tiny_model: Path, tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder opened with other settings: exit 2, each that differs is named with both values, nothing changes."""
    run = plan_tiny(tmp_path / "run", mode="augment", variants=3, seed=5, limit=40)
    job, before = run.plan.job, tree(run.path)
    model = shutil.copytree(tiny_model, tmp_path / "other-model")
    source = shutil.copytree(tiny_source, tmp_path / "other-source")
    others = {"t_boom": "0.5", "seed": 6, "eta": 0.5, "model": str(model), "dataset": str(source), "variants": 2}
    for changes in (*({name: value} for name, value in others.items()), others):
        assert main(command_line(job, run.path, verb="augment", **changes)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        told = captured.err.partition("was planned with ")[2].partition("; use another --out")[0].split(", ")
        names = [f"{name} {getattr(job, name)} (now {value})" for name, value in changes.items()]
        names += [f"source {tiny_source} (now {source})"] if "dataset" in changes else []
        assert sorted(told) == sorted(names)
        assert tree(run.path) == before
    assert main(command_line(job, run.path, verb="anonymize", eta=1.0)) == 2
    assert "mode augment (now anonymize)" in capsys.readouterr().err
    assert tree(run.path) == before


def test_environment_class(plan_tiny: PlanTiny, tiny_source: Path, tmp_path: Path, boomgen: Any) -> None:
    """A run planned for another CPU capability is refused here, with the setting named; --allow-mixed runs it, and the
    done records tell what it ran on."""
    run = tmp_path / "run"
    job = plan_tiny(tmp_path / "here", limit=16).plan.job
    other = os.environ | {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    boomgen(*command_line(job, run, "--limit", "16", verb="plan"), env=other)
    here, there = env.environment("cpu"), RunDir(run).plan.environment
    assert there == here | {"cpu_capability": "DEFAULT"} != here
    done = boomgen("resume", run, "--workers", 1, check=False)
    assert done.returncode == 1
    line = f"this device is not of the planned class: cpu_capability DEFAULT (here {here['cpu_capability']}); "
    assert done.stderr.splitlines()[-1].startswith(f"boomgen: {line}")
    assert RunDir(run).missing() == [0]
    boomgen("resume", run, "--workers", 1, "--allow-mixed")
    assert unseal((run / "shards" / "00000" / "done.json").read_bytes())["environment"] == here
    assert not list(verify(RunDir(run)))


def test_another_secret_is_named(
    plan_tiny: PlanTiny, secret_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder opened with its own secret goes on; with another it is refused, or the caller would believe that
    the outputs follow from the secret that was given."""
    run = plan_tiny(tmp_path / "run")
    (tmp_path / "other").write_text("5a" * 32)
    again = command_line(run.plan.job, run.path, verb="plan")
    assert main([*again, "--secret-file", str(secret_file)]) == 0
    capsys.readouterr()
    assert main([*again, "--secret-file", str(tmp_path / "other")]) == 2
    assert f"{run.path} was planned with another secret than {tmp_path / 'other'};" in capsys.readouterr().err
