"""What every source of images offers: rows in a fixed order, and the bytes of one row."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from boomgen.errors import UsageError

NO_LABEL = -1
NO_SPLIT = "data"  # the split's name where a source is not divided into splits
OTHER_CLASS = "images of other classes"  # what is passed over where only some classes are wanted
MAX_CAPTION = 4_000  # characters; no text encoder takes as many
SPLITS = ("train", "val", "valid", "validation", "test")  # folder and file names that mean a split, not a class

RawImage = bytes | NDArray[np.uint8]
"""An encoded image file, or pixels of shape (H, W) or (H, W, 3)."""


class Row(NamedTuple):
    """Where one image of a source is. `key` is unique in it; `size` is in bytes, -1 where only reading tells."""

    key: str
    path: str  # relative to the source's root; "" where the source is one table
    offset: int  # byte offset of the image in `path`, or the row number of a table
    size: int
    label: int = NO_LABEL
    caption: str = ""  # at most MAX_CAPTION characters; "" where there is none, or none was asked for


class Reader(Protocol):
    """Images of rows that are known."""

    def read(self, row: Row) -> RawImage:
        """The image as it is stored. A missing, moved or shortened file is an OSError (it may come back)."""


class Source(Reader, Protocol):
    """A labelled image data set at rest. Opening one reads no pixels."""

    kind: str
    split: str  # the split that was chosen; NO_SPLIT where there are none
    classes: tuple[str, ...]  # class names in label order; empty where the source does not name them
    passed_over: Counter[str]  # what `rows` met and left out so far, by kind ('.heic')

    def rows(self) -> Iterator[Row]:
        """All rows in the source's own order, the same on every call and machine."""


class Columns(NamedTuple):
    """What is asked of a source. Which columns of a table hold image, label and caption: None means the first that
    fits. Which labels count, and whether captions are wanted."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    captions: bool = False
    numbers: tuple[
        int, ...
    ] = ()  # the labels that become 0, 1, ...; rows of others are left out. Empty: all, as they are


def caption_of(text: str | bytes) -> str:
    """A caption on one line; bytes that are not UTF-8 are replaced."""
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return " ".join(text.split())[:MAX_CAPTION]


def choose_split(found: Sequence[str], asked: str | None, where: str) -> str:
    """The asked split; if none is asked, 'train' or the only one there is. UsageError names what was found."""
    if asked in found:
        return str(asked)
    if not found:
        raise UsageError(f"{where}: no split {asked!r}, it is not divided into splits; drop --split")
    if asked is None and "train" in found:
        return "train"
    if asked is None and len(found) == 1:
        return found[0]
    got = "no split was asked for and none is called 'train'" if asked is None else f"no split {asked!r}"
    raise UsageError(f"{where}: {got}; pass --split with one of {', '.join(found)}")
