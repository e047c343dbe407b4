"""MedMNIST's files: an npz with the arrays SPLIT_images and SPLIT_labels of each split. No pickle is ever read."""

import math
import os
import struct
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfileobj
from threading import Lock
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError
from boomgen.sources.base import NO_LABEL, Row, choose_split

IMAGES, LABELS = "_images.npy", "_labels.npy"
MAX_LABELS = 2**28  # bytes
MAX_BYTES = 2**38  # of images in one file
DEFLATE = 1100  # more than any compressed byte can stand for
LOCAL_HEADER = 30  # bytes of a member's own header, before its name


class Head(NamedTuple):
    """What the header of an array says."""

    start: int  # bytes before the data
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def is_here(place: Path) -> bool:
    """Whether a file is an npz with images."""
    return place.suffix == ".npz" and place.is_file() and bool(_splits(place))


class Npz:
    """One split. A row is read from its place in the file; compressed images are first unpacked to a nameless file."""

    kind = "npz"
    classes: tuple[str, ...] = ()

    def __init__(self, path: Path, split: str | None) -> None:
        self.passed_over = Counter[str]()
        self._path, self._lock = path, Lock()
        self._opened: tuple[IO[bytes], int] | None = None
        self.split = choose_split(_splits(path), split, str(path))
        self._head, _ = _array(path, self.split + IMAGES, MAX_BYTES, data=False)
        shape = self._head.shape
        if self._head.dtype != np.uint8 or 0 in shape or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
            raise UsageError(
                f"{path}: {self.split} images are {self._head.dtype} of shape {shape}; expected unsigned bytes, "
                "(N, H, W) or (N, H, W, 3): volumes are not read"
            )
        self._labels = _labels(path, self.split, shape[0])

    def rows(self) -> Iterator[Row]:
        """Offsets and sizes are bytes of the unpacked pixel data."""
        size = math.prod(self._head.shape[1:])
        for i, label in enumerate(self._labels.tolist()):
            yield Row(f"{self.split}-{i:06d}", self.split + IMAGES, i * size, size, label)

    def read(self, row: Row) -> NDArray[np.uint8]:
        """Pixels of shape (H, W) or (H, W, 3)."""
        with self._lock:
            if self._opened is None:
                self._opened = _unpacked(self._path, self.split + IMAGES)
            file, start = self._opened
        data = os.pread(file.fileno(), row.size, start + self._head.start + row.offset)
        if len(data) != row.size:
            raise OSError(f"{self._path} is not what it was when the rows were listed: {row.key} is cut short")
        return np.frombuffer(data, np.uint8).reshape(self._head.shape[1:])


def _splits(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(name.removesuffix(IMAGES) for name in archive.namelist() if name.endswith(IMAGES))
    except Exception:  # here and below: whatever `zipfile` makes of odd bytes
        return []


def _labels(path: Path, split: str, count: int) -> NDArray[np.int64]:
    """(N,), NO_LABEL where an image has several labels."""
    head, data = _array(path, split + LABELS, MAX_LABELS, data=True)
    if head.dtype.kind not in "iu" or len(head.shape) not in (1, 2) or head.shape[0] != count:
        raise UsageError(
            f"{path}: {split} labels are {head.dtype} of shape {head.shape}; expected whole numbers, ({count}, 1)"
        )
    if head.shape[1:] not in ((), (1,)):
        return np.full(count, NO_LABEL)
    return np.frombuffer(data, head.dtype).astype(np.int64)


def _array(path: Path, name: str, limit: int, *, data: bool) -> tuple[Head, bytes]:
    """The header of an array, and its bytes if asked for."""
    expected = "expected a whole file of MedMNIST: download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            if name not in archive.namelist():
                raise ValueError(f"it has no {name}")
            info = archive.getinfo(name)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is packed in a way that no npz is")
            with archive.open(info) as file:
                head = _head(file)
                claimed = math.prod(head.shape) * head.dtype.itemsize + head.start
                room = info.compress_size * (DEFLATE if info.compress_type else 1)
                if claimed != info.file_size or info.file_size > min(limit, room):
                    raise ValueError(f"{name} has {info.file_size} bytes, its header says {claimed}")
                return head, file.read() if data else b""
    except Exception as err:
        raise UsageError(f"{path} is not readable ({' '.join(str(err).split())[:200]}); {expected}") from err


def _head(file: IO[bytes]) -> Head:
    """The header of an npy file, which numpy reads as a literal."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(file)
    if fortran or dtype.hasobject or any(side < 0 for side in shape):
        raise ValueError("an array in Fortran's order or of Python objects")
    return Head(file.tell(), shape, dtype)


def _unpacked(path: Path, name: str) -> tuple[IO[bytes], int]:
    """A file that holds a member as it is, and where in it the member begins. OSError where that fails."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(name)
            if info.compress_type == zipfile.ZIP_STORED:
                file = path.open("rb")
                lengths = struct.unpack("<HH", os.pread(file.fileno(), 4, info.header_offset + LOCAL_HEADER - 4))
                return file, info.header_offset + LOCAL_HEADER + sum(lengths)
            unpacked = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the source
            with archive.open(info) as packed:
                copyfileobj(packed, unpacked, 2**20)
            unpacked.flush()
            return unpacked, 0
    except Exception as err:
        raise OSError(f"{path} cannot be unpacked into {tempfile.gettempdir()} (TMPDIR sets it): {err}") from err
