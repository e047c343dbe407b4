"""How a shard becomes visible: built in a private staging folder, made durable, then published by ONE rename.

A published shard folder holds `data.tar`, `manifest.parquet` and `done.json` or does not exist. A rename onto a folder
that exists fails, so of two workers on one shard the first wins and the other's files vanish whole.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from boomgen.places import Place, opened
from boomgen.untrusted import read_json

TAR, PART, DONE = "data.tar", "manifest.parquet", "done.json"
FAILPOINTS = ("staged", "row-written", "tar-closed", "part-written", "done-written", "synced", "published")


def failpoint(name: str, shard: int) -> None:
    """A named moment of the protocol. BOOMGEN_FAILPOINT=NAME:SHARD kills the process there, as a power cut would."""
    if os.environ.get("BOOMGEN_FAILPOINT") == f"{name}:{shard}":
        os.kill(os.getpid(), signal.SIGKILL)


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one way a record is written as JSON, so that any changed byte is noticed."""
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def sealed(record: Mapping[str, Any]) -> bytes:
    """A record with its own sha256 inside."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    return canonical(body | {"sha256": hashlib.sha256(canonical(body)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any]:
    """The record of `sealed` bytes.

    Raises:
        ValueError: any byte differs from what was written.
    """
    record = read_json(data)
    if not isinstance(record, dict) or sealed(record) != data:
        raise ValueError("the record is not what was written")
    return record


def sha256_file(path: Place) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_durable(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_part(part: pa.Table, path: Path) -> None:
    """Write a manifest part through a file of Python's: Arrow's own do not say why they fail."""
    with path.open("wb") as file:
        pq.write_table(part, file, compression="zstd")


def sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:  # some network disks cannot sync a folder
        if err.errno not in (errno.EINVAL, errno.ENOTSUP) or path.is_file():
            raise
    finally:
        os.close(handle)


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), 0o444, 0
    tar.addfile(member, io.BytesIO(data))


class ShardWriter:
    """One attempt at one shard. `row` any number of times, then `seal`, then `publish`; `abandon` at any time."""

    def __init__(self, shards: Path, staging: Path, number: int) -> None:
        self.number, self.final = number, shards / f"{number:05d}"
        self.folder = staging / f"{number:05d}-{uuid.uuid4().hex[:12]}"
        shards.mkdir(exist_ok=True)
        try:
            self.folder.mkdir(parents=True)
            self._file: IO[bytes] = (self.folder / TAR).open("wb")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            failpoint("staged", number)
        except BaseException:  # nobody holds this writer yet to abandon it
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def row(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add one sample: file extension -> content."""
        for extension in sorted(members):
            _add_member(self._tar, f"{key}.{extension}", members[extension])
        failpoint("row-written", self.number)

    def touch(self) -> None:
        """Show other workers that this attempt goes on."""
        os.utime(self.folder)

    def seal(self, part: pa.Table, record: Mapping[str, Any]) -> None:
        """Close the tar, write the manifest part and the done record with the hashes of both, and make all durable."""
        for moment in self.sealing(part, record):
            failpoint(moment, self.number)

    def sealing(self, part: pa.Table, record: Mapping[str, Any]) -> Iterator[str]:
        """`seal` in steps, each named when it is done."""
        self._tar.close()
        self._file.close()
        yield "tar-closed"
        write_part(part, self.folder / PART)
        yield "part-written"
        files = {
            name: {"sha256": sha256_file(self.folder / name), "bytes": (self.folder / name).stat().st_size}
            for name in (TAR, PART)
        }
        (self.folder / DONE).write_bytes(sealed({**record, "shard": self.number, "files": files}))
        yield "done-written"
        for path in (self.folder / TAR, self.folder / PART, self.folder / DONE, self.folder):
            sync(path)
        yield "synced"

    def publish(self) -> bool:
        """Make the shard visible. False if another worker had published it before."""
        try:
            self.folder.rename(self.final)
        except OSError as err:
            if err.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            self.abandon()
            return False
        sync(self.final.parent)
        failpoint("published", self.number)
        return True

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # it writes what is left, and a full disk is full for that too
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
