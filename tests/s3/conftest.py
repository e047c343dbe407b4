"""The S3 server of the tests, started once in a process of pytest."""

import uuid
from collections.abc import Iterator

import pytest
from fsspec.config import conf

from .server import S3, serving


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
