"""The S3 server of the tests, started once in a process of pytest, and runs that are planned for it."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.config import conf

from boomgen.job import Launch
from boomgen.prepare import prepare
from boomgen.run import RunDir

from ..conftest import PlanTiny
from .server import S3, serving

PlanAway = Callable[..., RunDir]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A fresh bucket, no faults, and an environment in which every client finds the server."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("s3", "s3a"):
        monkeypatch.setitem(conf, name, {})  # what an earlier test configured
    for name, value in s3_server.environ.items():
        monkeypatch.setenv(name, value)
    s3_server.bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3_server.behind.mkdir(s3_server.bucket)
    s3_server.faults.clear()
    s3_server.met.clear()
    s3_server.asked.clear()
    yield s3_server
    s3_server.faults.clear()


@pytest.fixture
def plan_away(plan_tiny: PlanTiny, tmp_path: Path, secret_file: Path) -> PlanAway:
    """A tiny run planned for a URL, its folder at tmp_path/run_at_home; the same job's run on disk is tmp_path/here."""

    def plan(url: str, **changes: Any) -> RunDir:
        job = plan_tiny(tmp_path / "here", **changes).plan.job
        secret = {"secret_file": str(secret_file)} if job.mode == "anonymize" else {}
        return prepare(job, Launch(out=url, private_dir=str(tmp_path / "run_at_home"), device="cpu", **secret))

    return plan
