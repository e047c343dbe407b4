"""A folder of image files: one sub-folder per class, or a flat folder without labels."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from boomgen import places
from boomgen.errors import UsageError
from boomgen.places import Entry, Place
from boomgen.sources.base import MAX_CAPTION, NO_LABEL, NO_SPLIT, OTHER_CLASS, SPLITS, Row, caption_of, choose_split

EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"))
THOUSAND = re.compile(r"\d\d000")
CAPTION = ".txt"


def is_here(place: Place) -> bool:
    """Whether a folder holds image files at any depth."""
    return places.is_folder(place) and _holds_images(place)


class Folder:
    """Rows in the order of a sorted walk. Hidden names are skipped, and linked folders are not followed.

    `wanted` names the class folders in label order; images in others are passed over. Empty: all that are there.
    With `captions`, the caption of NAME.jpg is what NAME.txt beside it says.
    """

    kind = "folder"
    captions = False

    def __init__(self, root: Place, split: str | None, wanted: tuple[str, ...] = (), captions: bool = False) -> None:
        self.passed_over, self.captions = Counter[str](), captions
        self.root, self.split = _choose(root, split)
        found = _classes(self.root)
        if wanted and set(wanted).isdisjoint(found):
            held = f"the folders {', '.join(found[:3])}" if found else "no class folders"
            raise UsageError(f"{self.root} holds {held}; expected some of {', '.join(wanted[:3])} ...: is it another?")
        self.classes = wanted or found

    def rows(self) -> Iterator[Row]:
        """Key and path are the file's path below the root; the label is the place of its top folder in `classes`."""
        self.passed_over.clear()
        if not self.classes:
            yield from self._rows(self.root, NO_LABEL)
            return
        labels = {name: label for label, name in enumerate(self.classes)}
        for entry in _entries(self.root):
            if entry.name in labels and _is_folder(entry):
                yield from self._rows(entry, labels[entry.name])
            elif _is_folder(entry):
                self._pass_by(sum(1 for _ in self._images(entry)))
            else:
                self._pass_over(entry)

    def _rows(self, folder: Place | Entry, label: int) -> Iterator[Row]:
        return (self._row(entry, label) for entry in self._images(folder))

    def _row(self, entry: Entry, label: int) -> Row:
        key = places.below(entry, self.root)
        try:
            return Row(key, key, 0, entry.stat().st_size, label, _caption(entry) if self.captions else "")
        except OSError as err:
            raise UsageError(f"{entry.path}: {err.strerror}; expected an image file: mend or remove it") from err

    def _images(self, folder: Place | Entry) -> Iterator[Entry]:
        waiting = [_entries(folder)[::-1]]
        while waiting:
            if not waiting[-1]:
                waiting.pop()
            elif _is_image(entry := waiting[-1].pop()):
                yield entry
            elif _is_folder(entry):
                waiting.append(_entries(entry)[::-1])
            else:
                self._pass_over(entry)

    def _pass_by(self, images: int) -> None:
        self.passed_over += Counter({OTHER_CLASS: images})

    def _pass_over(self, entry: Entry) -> None:
        if entry.is_dir() or entry.name.startswith("."):
            return
        extension = os.path.splitext(entry.name)[1].lower()
        if extension == CAPTION and self.captions:
            return
        self.passed_over[extension or "file without extension"] += 1

    def read(self, row: Row) -> bytes:
        """The file's bytes."""
        return read(self.root, row)


class Listed(Folder):
    """A flat folder whose labels are in a list: `label_of` tells the label of a file's name, NO_LABEL to leave it out.

    `label_of` None: none of the images has a label.
    """

    def __init__(
        self, root: Path, split: str, classes: tuple[str, ...], label_of: Mapping[str, int] | None, where: Path
    ) -> None:
        self.passed_over = Counter[str]()
        self.root, self.split, self.classes = root, split, classes
        self._label_of, self._list = label_of, where

    def rows(self) -> Iterator[Row]:
        """Key and path are the file's name."""
        self.passed_over.clear()
        for entry in self._images(self.root):
            label = NO_LABEL if self._label_of is None else self._label_of.get(os.path.splitext(entry.name)[0])
            if label is None:
                raise UsageError(
                    f"{self._list} has no line for {entry.name}; expected one for each image: fetch it again"
                )
            if label == NO_LABEL and self._label_of is not None:
                self._pass_by(1)
            else:
                yield self._row(entry, label)


def read(root: Place, row: Row) -> bytes:
    """The bytes of an image file below `root`."""
    data = places.read(root / row.path, 0, row.size + 1)  # one more, which tells that the file has grown
    if len(data) != row.size:
        held = f"{len(data)} bytes" if len(data) < row.size else "more bytes"
        raise OSError(f"{root / row.path} has {held}, it had {row.size} when the rows were listed")
    return data


def _caption(entry: Entry) -> str:
    return caption_of(
        places.beginning(places.beside(entry, os.path.splitext(entry.name)[0] + CAPTION), 4 * MAX_CAPTION)
    )


def _choose(root: Place, split: str | None) -> tuple[Place, str]:
    """The folder whose sub-folders are classes, and the split's name.

    Without a split asked, sub-folders are taken for splits only if all of them have such names: `train` beside
    `airplane` and `car` is a class. Asking again for the split that was chosen chooses the same.
    """
    split = None if split == NO_SPLIT else split
    if split is not None and places.is_folder(root / split):
        return root / split, split
    folders = [entry for entry in _entries(root) if _is_folder(entry)]
    names = [entry.name for entry in folders if entry.name in SPLITS and _holds_images(entry)]
    if names and not any(_holds_images(entry) for entry in folders if entry.name not in SPLITS):
        chosen = choose_split(names, split, str(root))
        return root / chosen, chosen
    return root, NO_SPLIT if split is None else choose_split([], split, str(root))


def _classes(root: Place) -> tuple[str, ...]:
    entries = _entries(root)
    classes = tuple(entry.name for entry in entries if _is_folder(entry) and _holds_images(entry))
    loose = [entry.name for entry in entries if _is_image(entry)]
    if classes and loose:
        raise UsageError(
            f"{root} holds images ({loose[0]}, {len(loose)} in all) beside folders of images ({classes[0]}); expected "
            "class folders only, or images only: move one of them away"
        )
    return () if all(_holds_a_thousand(root / name) for name in classes) else classes


def _holds_a_thousand(folder: Place) -> bool:
    """Whether a folder is one of those that only keep folders small: 03000 holds 03000.png to 03999.png (FFHQ)."""
    inside = re.compile(rf"{folder.name[:2]}\d\d\d\.\w+")
    return bool(THOUSAND.fullmatch(folder.name)) and all(
        inside.fullmatch(entry.name) for entry in _entries(folder) if not entry.name.startswith(".")
    )


def _is_folder(entry: Entry) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _is_image(entry: Entry) -> bool:
    stem, dot, extension = entry.name.rpartition(".")
    named = bool(stem and dot) and extension.lower() in EXTENSIONS and stem[0] != "."
    return named and (entry.is_file() or _is_broken(entry))  # a broken link is told of, a pipe passed over


def _is_broken(entry: Entry) -> bool:
    return not (entry.is_dir() or os.path.exists(entry.path))


def _entries(folder: Place | Entry) -> list[Entry]:
    return sorted(places.scan(folder), key=lambda entry: os.fsencode(entry.name))


def _holds_images(folder: Place | Entry) -> bool:
    waiting = [folder]
    while waiting:
        for entry in places.scan(waiting.pop()):
            if _is_image(entry):
                return True
            if _is_folder(entry):
                waiting.append(entry)
    return False
