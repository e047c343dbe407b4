"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped."""

import gzip
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError
from boomgen.sources.base import Row, choose_split

IMAGES, LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"
PREFIX = {"test": "t10k"}  # every other split is its own prefix
UNSIGNED_BYTES = 8  # the type code of the magic number
MAX_BYTES = 2**34  # of pixels in one file
DEFLATE = 1100  # more than any compressed byte can stand for


def is_here(place: Path) -> bool:
    """Whether a folder holds IDX image files."""
    return place.is_dir() and bool(_splits(place))


class Idx:
    """One split of a folder of IDX files; the pixels are decompressed once and kept."""

    kind = "idx"
    classes: tuple[str, ...] = ()

    def __init__(self, root: Path, split: str | None) -> None:
        self.passed_over = Counter[str]()
        self.split = choose_split(_splits(root), split, str(root))
        self._prefix = PREFIX.get(self.split, self.split)
        self._images = _file(root, self._prefix + IMAGES)
        self._labels = _array(_file(root, self._prefix + LABELS), dims=1)

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        """(N, H, W)."""
        pixels = _array(self._images, dims=3)
        if 0 in pixels.shape[1:]:
            raise UsageError(f"{self._images} holds images without pixels ({pixels.shape[1:]}); download it again")
        if len(pixels) != len(self._labels):
            raise UsageError(
                f"{self._images} holds {len(pixels)} images, but its labels file {len(self._labels)} labels; "
                "expected as many of each: download both again"
            )
        return pixels

    def rows(self) -> Iterator[Row]:
        """Offsets and sizes are bytes of the decompressed pixel data."""
        size = math.prod(self._pixels.shape[1:])
        for i, label in enumerate(self._labels):
            yield Row(f"{self._prefix}-{i:05d}", self._images.name, i * size, size, int(label))

    def read(self, row: Row) -> NDArray[np.uint8]:
        """Pixels of shape (H, W)."""
        try:
            pixels: NDArray[np.uint8] = self._pixels[row.offset // row.size]
            return pixels
        except (UsageError, IndexError) as err:
            raise OSError(f"{self._images} is not what it was when the rows were listed: {err}") from err


def _splits(root: Path) -> list[str]:
    prefixes = {path.name.split(IMAGES)[0] for ending in ("", ".gz") for path in root.glob(f"*{IMAGES}{ending}")}
    names = {prefix: split for split, prefix in PREFIX.items()}
    return sorted(names.get(prefix, prefix) for prefix in prefixes)


def _file(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(f"{root} has no {name} or {name}.gz; expected both the images and the labels file of a split")


def _array(path: Path, dims: int) -> NDArray[np.uint8]:
    """A whole IDX file of unsigned bytes as an array of `dims` dimensions."""
    magic, start = bytes([0, 0, UNSIGNED_BYTES, dims]), 4 + 4 * dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(start)
            if head[:4] != magic or len(head) < start:
                raise UsageError(
                    f"{path} begins with {head[:4].hex() or 'nothing'}, expected {magic.hex()} and {dims} dimensions "
                    "(IDX of unsigned bytes): download it again"
                )
            shape = struct.unpack_from(f">{dims}I", head, 4)
            claimed, room = math.prod(shape), path.stat().st_size * (DEFLATE if path.suffix == ".gz" else 1)
            data = file.read(claimed + 1) if claimed <= min(room, MAX_BYTES) else b""
    except (OSError, EOFError, zlib.error) as err:
        raise UsageError(f"{path} is not readable ({err}); expected a whole IDX file: download it again") from err
    if len(data) != claimed:
        held = "too many" if len(data) > claimed else str(len(data)) if data else "too few"
        raise UsageError(
            f"{path} holds {held} bytes of data, expected {claimed} ({' x '.join(map(str, shape))}): download it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
