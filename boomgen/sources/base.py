"""What every source of images offers: rows in a fixed order, and the bytes of one row."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

NO_LABEL = -1

RawImage = bytes | NDArray[np.uint8]
"""An encoded image file, or pixels of shape (H, W) or (H, W, 3)."""


class Row(NamedTuple):
    """Where one image of a source is. `key` is unique in the source; `size` is in bytes, -1 where only reading tells."""

    key: str
    path: str  # relative to the source's root; "" where the source is one table
    offset: int  # byte offset of the image in `path`, or the row number of a table
    size: int
    label: int = NO_LABEL


class Source(Protocol):
    """A labelled image data set at rest. Opening one reads no pixels."""

    kind: str
    classes: tuple[str, ...]  # class names in label order; empty where the source does not name them

    def rows(self) -> Iterator[Row]:
        """All rows in the source's own order, the same on every call and machine."""

    def read(self, row: Row) -> RawImage:
        """The image as it is stored. A missing, moved or shortened file is an OSError (it may come back)."""
