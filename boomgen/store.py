"""Where the shards and the data set of a run lie: in its folder, or in an object store.

On disk a shard becomes visible by one rename. An object store has none: there a shard's tar and manifest part are
placed first, under names made of their hashes, so that no two attempts can mix; then its done record is put under the
shard's own name, on the condition that nobody has done so before. The manifest part links outputs to sources, so it
stays in the run folder, which all workers see. An object is whole or not there at all.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from upath import UPath

from boomgen import manifest
from boomgen.errors import BoomgenError, UsageError
from boomgen.places import Place, StorageError, bulk, exists, files, insist, line, place, put_first, upload
from boomgen.shard import (
    DONE,
    PART,
    TAR,
    ShardWriter,
    failpoint,
    sealed,
    sha256_file,
    sync,
    unseal,
    write_durable,
    write_part,
)

FAILPOINTS = ("tar-put", "part-placed", "record-put")
"""Named moments of publishing to an object store."""
CARD, CLOSING = "README.md", "dataset.json"
CLAIM = "plan.sha256"
"""The object that says whose shards lie here."""
AT_ONCE = 16  # requests that copy or remove a tar
Change = Callable[[pa.Table], pa.Table]


class Store(Protocol):
    """Where shards become visible, and where the files of a whole one are."""

    @property
    def dataset(self) -> Place:
        """The data set."""

    def whole(self) -> set[int]:
        """Numbers of the shards that are whole."""

    def holds(self, number: int) -> bool:
        """Whether this shard is whole."""

    def where(self, number: int) -> Place:
        """The folder of a shard: without it, the shard is made again."""

    def record(self, number: int) -> bytes:
        """The sealed done record of a whole shard. OSError: it cannot be read."""

    def part(self, number: int) -> Path:
        """Its manifest part."""

    def tar(self, number: int) -> Place:
        """Its tar."""

    def publish(self, shard: ShardWriter) -> bool:
        """Make a sealed shard visible. False if another worker had published it before."""

    def change_part(self, number: int, change: Change) -> None:
        """Change its manifest part, and what its done record says of it. After a kill, it can be done again."""

    def closed(self) -> bool:
        """Whether the data set is there."""

    def close(self, tars: Mapping[int, str], texts: Mapping[str, bytes]) -> None:
        """Make the data set appear: tars of whole shards under their names in it, and texts."""


class Folder:
    """RUN/shards/00000/ holds data.tar, manifest.parquet and done.json, or does not exist."""

    def __init__(self, run: Path) -> None:
        self.run, self.dataset = run, run / "dataset"

    def whole(self) -> set[int]:
        shards = self.run / "shards"
        return _numbers(os.listdir(shards) if shards.is_dir() else ())

    def holds(self, number: int) -> bool:
        return self.where(number).exists()

    def where(self, number: int) -> Path:
        return self.run / "shards" / f"{number:05d}"

    def record(self, number: int) -> bytes:
        return (self.where(number) / DONE).read_bytes()

    def part(self, number: int) -> Path:
        return self.where(number) / PART

    def tar(self, number: int) -> Path:
        return self.where(number) / TAR

    def publish(self, shard: ShardWriter) -> bool:
        return shard.publish()

    def change_part(self, number: int, change: Change) -> None:
        """The record first, then the part: a kill between them leaves a new part beside the old that it knows."""
        record, part = unseal(self.record(number)), self.part(number)
        known, new = record["files"][PART]["sha256"], part.with_name(f".{PART}")
        for stray in part.parent.glob(f".{DONE}.*"):  # of a kill
            stray.unlink()
        if part.exists() and sha256_file(part) == known:
            if not _write_changed(part, new, change):
                return
            write_durable(self.where(number) / DONE, _with_part(record, new))
        elif not new.exists() or sha256_file(new) != known:
            raise BoomgenError(
                f"{part} differs from its done record; remove {part.parent} and go on with: boomgen resume {self.run}"
            )
        new.replace(part)
        sync(part.parent)

    def closed(self) -> bool:
        return self.dataset.exists()

    def close(self, tars: Mapping[int, str], texts: Mapping[str, bytes]) -> None:
        place_folder(self.run, self.dataset, {name: self.tar(number) for number, name in tars.items()}, texts)


class Bucket:
    """An object store: URL/shards/00000/ holds done.json and, until the run is closed, SHA256.tar; URL/dataset/ holds
    the data set. RUN/shards/00000/ holds SHA256.parquet and a copy of the record.

    Whatever reaches for the store raises BoomgenError where it cannot.
    """

    def __init__(self, url: str, run: Path) -> None:
        self.url, self.run = UPath(place(url)), run
        self.dataset, self._fs = self.url / "dataset", files(self.url)
        self._placed = dict[int, str]()  # known once the run is closed

    @cached_property
    def _bulk(self) -> Any:
        """For tars: who only looks at a run needs no second client."""
        return bulk(self.url)

    def whole(self) -> set[int]:
        with self._reached():
            return _numbers(name.split("/")[-2] for name in self._find("shards") if name.endswith(f"/{DONE}"))

    def holds(self, number: int) -> bool:
        with self._reached():
            return exists(self.where(number) / DONE)

    def where(self, number: int) -> UPath:
        return self.url / "shards" / f"{number:05d}"

    def record(self, number: int) -> bytes:
        copy = self._private(number) / DONE
        if copy.exists():
            return copy.read_bytes()
        with self._reached():
            return self._get(self.where(number) / DONE)

    def part(self, number: int) -> Path:
        return self._private(number) / f"{self._hash(number, PART)}.parquet"

    def tar(self, number: int) -> UPath:
        if not self._placed and (names := placed(self.run)) and self.closed():
            self._placed = names
        name = self._placed.get(number)
        return self.dataset / name if name else self._tar(number)

    def publish(self, shard: ShardWriter) -> bool:
        number = shard.number
        if self.holds(number):  # to put a tar takes long, and once the run is closed nobody would remove it
            shard.abandon()
            return False
        data = (shard.folder / DONE).read_bytes()
        hashes = {name: file["sha256"] for name, file in unseal(data)["files"].items()}
        part, tar = self._private(number) / f"{hashes[PART]}.parquet", self.where(number) / f"{hashes[TAR]}.tar"
        with self._reached():
            upload(self._bulk, shard.folder / TAR, tar)
        failpoint("tar-put", number)
        part.parent.mkdir(parents=True, exist_ok=True)
        sync(part.parent.parent)
        (shard.folder / PART).replace(part)
        sync(part.parent)
        failpoint("part-placed", number)
        with self._reached():
            first = self._put_first(self.where(number) / DONE, data)
        failpoint("record-put", number)
        if first:
            write_durable(part.parent / DONE, data)
        elif self.part(number) != part:  # it may hold links that are to be destroyed
            part.unlink(missing_ok=True)
        shard.abandon()
        return first

    def change_part(self, number: int, change: Change) -> None:
        """The new part has a name of its own, so that one record or the other is true at any time."""
        part, new = self.part(number), self._private(number) / f".{PART}"
        if _write_changed(part, new, change):
            data = _with_part(unseal(self.record(number)), new)
            part = part.with_name(f"{sha256_file(new)}.parquet")
            new.replace(part)
            sync(part.parent)
            with self._reached():
                self._put(self.where(number) / DONE, data)
            write_durable(part.parent / DONE, data)
        for stray in set(part.parent.iterdir()) - {part, part.parent / DONE}:
            stray.unlink()

    def closed(self) -> bool:
        with self._reached():
            return exists(self.dataset / CARD)

    def close(self, tars: Mapping[int, str], texts: Mapping[str, bytes]) -> None:
        """Tars are copied within the store, also into a data set that is closed: one may have been made again. The card
        comes last, since it says that all is there; then the shards' own copies go."""
        with self._reached(), ThreadPoolExecutor(AT_ONCE) as pool:
            found = {name for name in self._find("shards") if name.endswith(".tar")}
            there = set(self._find("dataset"))  # after that: another finalise copies first, and then removes
            list(pool.map(lambda number: self._move(number, self.dataset / tars[number], found, there), tars))
            if not self.closed():
                for name in sorted(texts, key=CARD.__eq__):
                    self._put(self.dataset / name, texts[name])
            list(pool.map(self._remove, found))

    def _move(self, number: int, target: UPath, found: Container[str], there: Container[str]) -> None:
        """Copy a shard's tar to its place in the data set, unless it is there alone."""
        own = self._tar(number)
        try:
            if own.path in found:
                self._copy(own, target)
            elif target.path not in there:
                raise FileNotFoundError
        except FileNotFoundError as err:
            if not exists(target):  # if it does, another finalise was first
                again = f"remove {self.where(number)}, then: boomgen resume {self.run}"
                raise BoomgenError(f"{own} is gone; {again}") from err

    def claim(self, plan_sha256: str) -> None:
        """Take this place for a plan.

        Raises:
            UsageError: it is another's.
        """
        with self._reached():
            if not self._put_first(self.url / CLAIM, plan_sha256.encode() + b"\n"):
                raise UsageError(f"{self.url} holds another run; use another --out")

    def taken(self) -> bool:
        """Whether a plan has claimed it."""
        with self._reached():
            return exists(self.url / CLAIM)

    def try_out(self) -> None:
        """Put an empty object and remove it: better than to learn after hours of planning that none may be put.

        Raises:
            UsageError: there is no such bucket.
            BoomgenError: it cannot be reached, or may not be written.
        """
        probe = self.url / f"probe-{uuid.uuid4().hex}"
        with self._reached():
            try:
                self._put(probe, b"")
            except FileNotFoundError as err:
                raise UsageError(f"{self.url}: {line(err)}; create it, or use another --out") from err
            self._remove(probe.path)

    def _private(self, number: int) -> Path:
        return self.run / "shards" / f"{number:05d}"

    def _hash(self, number: int, name: str) -> str:
        try:
            return str(unseal(self.record(number))["files"][name]["sha256"])
        except ValueError as err:
            raise BoomgenError(f"{self.where(number) / DONE} is damaged ({err})") from err

    def _tar(self, number: int) -> UPath:
        return self.where(number) / f"{self._hash(number, TAR)}.tar"

    def _put(self, name: UPath, data: bytes) -> None:
        insist(lambda: self._fs.pipe_file(name.path, data), name)

    def _put_first(self, name: UPath, data: bytes) -> bool:
        """Whether nobody had put anything else under this name."""
        try:
            put_first(self._fs, name, data)
        except FileExistsError:  # perhaps it is this, and the answer was lost
            return self._get(name) == data
        return True

    def _get(self, name: UPath) -> bytes:
        return insist(lambda: bytes(self._fs.cat_file(name.path)), name)

    def _copy(self, origin: UPath, target: UPath) -> None:
        insist(lambda: self._bulk.cp_file(origin.path, target.path), target)

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            insist(lambda: self._fs.rm_file(name), name)

    def _find(self, part: str) -> list[str]:
        """All that lies below a folder of the run."""
        self._fs.invalidate_cache()
        return insist(lambda: list(self._fs.find((self.url / part).path)), self.url)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            told = str(err) if isinstance(err, StorageError | PermissionError) else f"{self.url}: {line(err)}"
            again = f"; then go on with: boomgen resume {self.run}" if (self.run / "plan.json").exists() else ""
            raise BoomgenError(f"{told}{again}") from err


def open_store(url: str | None, run: Path) -> Store:
    """Where a run's shards are: an object store at a URL, or its folder."""
    return Bucket(url, run) if url else Folder(run)


def place_folder(run: Path, folder: Path, links: Mapping[str, Path], texts: Mapping[str, bytes]) -> None:
    """Make a folder appear whole in a run. One that is there already is left alone."""
    if folder.exists():
        return
    staging = run / "staging" / f"{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        for name, origin in links.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _link(origin, staging / name)
        for name, data in texts.items():
            write_durable(staging / name, data)
        for inside in {(staging / name).parent for name in links} | {staging}:
            sync(inside)
        staging.rename(folder)
    except OSError:
        if not folder.exists():  # if it does, another finalise was first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(run)


def placed(run: Path) -> dict[int, str]:
    """Names in the data set of the shards' tars, as `finalise` noted them; none before."""
    try:
        record = unseal((run / CLOSING).read_bytes())
    except (OSError, ValueError):
        return {}
    return {int(number): name for number, name in record["tars"].items()}


def _link(origin: Path, target: Path) -> None:
    try:
        os.link(origin, target)
    except OSError:  # file systems without hard links
        shutil.copyfile(origin, target)
        sync(target)


def _write_changed(part: Path, new: Path, change: Change) -> bool:
    """Write a changed manifest part; False where there is nothing to change."""
    table = manifest.read_part(part)
    if (changed := change(table)).column_names == table.column_names:
        return False
    write_part(changed, new)
    sync(new)
    return True


def _with_part(record: Mapping[str, Any], part: Path) -> bytes:
    """A done record that knows this part."""
    files = record["files"] | {PART: {"sha256": sha256_file(part), "bytes": part.stat().st_size}}
    return sealed({**record, "files": files})


def _numbers(names: Iterable[str]) -> set[int]:
    return {int(name) for name in names if name.isdecimal()}
