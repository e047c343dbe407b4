"""The wheel alone, outside the checkout, does the job: jobs/, manifests/, slurm/, model and sample are inside."""

import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[1]


def test_every_dependency_is_pinned_for_the_tests() -> None:
    """And pinned to a version that the project allows, which is the one that is installed."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lines = [line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in asked:
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        assert metadata.version(requirement.name) == version


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, CHECKOUT], check=True)
    (wheel,) = folder.glob("boomgen-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([folder / "venv/bin/python", "-m", "pip", "--quiet", "install", "--no-deps", wheel], check=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (purelib / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "venv/bin"


def test_the_wheel_does_the_job_outside_the_checkout(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def said(program: str, *args: str) -> str:
        return subprocess.run([installed / program, *args], check=True, capture_output=True, text=True).stdout

    found = said("python", "-c", "import boomgen; print(boomgen.__file__)")
    assert Path(found.strip()).is_relative_to(installed.parent)
    small = ["--limit", "16", "--steps", "10", "--batch-size", "8", "--device", "cpu", "--workers", "1", "--out", "run"]
    said("boomgen", "run", "quickstart", *small)
    assert said("boomgen", "verify", "run") == "run is sound: 2 shards, 16 rows\n"
    shutil.rmtree(tmp_path / "run/shards/00001")
    assert "#SBATCH --array=1\n" in said("boomgen", "slurm", "run")
