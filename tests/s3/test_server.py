"""The server that the other tests here trust: what a client meets is what was asked for."""

import pytest
import s3fs

from .server import S3


@pytest.fixture
def fs(s3: S3) -> s3fs.S3FileSystem:
    """A client that gives up soon; only aiohttp sends once more by itself, where a kept connection has ended."""
    client = s3fs.S3FileSystem(config_kwargs={"read_timeout": 0.5, "retries": {"total_max_attempts": 1}})
    client.retries = 1
    return client


REFUSED = {
    "403": "Access Denied",
    "500": "internal error",
    "503": "reduce your request rate",
    "cut": "payload is not completed",
    "hang": "[Tt]imeout",
    "lost": "[Dd]isconnected|closed",
}


@pytest.mark.parametrize(("kind", "said"), REFUSED.items())
def test_a_reader_meets_what_was_asked_for(s3: S3, fs: s3fs.S3FileSystem, kind: str, said: str) -> None:
    place = f"{s3.bucket}/a.bin"
    fs.pipe_file(place, b"0123456789")
    fault = s3.fault(kind, times=2, method="GET", path="a.bin")
    while fault.left:
        with pytest.raises(Exception, match=said):
            fs.cat_file(place, start=2, end=8)
    assert fs.cat_file(place, start=2, end=8) == b"234567"
    assert (fault.met, s3.met) == (2, {kind: 2})
    assert s3.asked[1:] == [f"GET /{place} bytes=2-7"] * 3


@pytest.mark.parametrize(("kind", "there"), [("cut", False), ("lost", True), ("hang", False), ("503", False)])
def test_only_a_writer_whose_answer_was_lost_has_written(s3: S3, fs: s3fs.S3FileSystem, kind: str, there: bool) -> None:
    s3.fault(kind, times=2, method="PUT")
    with pytest.raises(Exception, match=r"\w"):
        fs.pipe_file(f"{s3.bucket}/a.bin", b"0" * 100_000)
    assert s3.behind.exists(f"{s3.bucket}/a.bin") == there


def test_only_one_can_create_an_object(s3: S3, fs: s3fs.S3FileSystem) -> None:
    place = f"{s3.bucket}/lock"
    fs.pipe_file(place, b"first", mode="create")
    with pytest.raises(FileExistsError):
        fs.pipe_file(place, b"second", mode="create")
    with pytest.raises(FileExistsError), fs.open(place, "xb") as file:
        file.write(b"third")
    assert s3.behind.cat_file(place) == b"first"
