"""A folder of image files: one sub-folder per class, or a flat folder without labels."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from boomgen.errors import UsageError
from boomgen.sources.base import NO_LABEL, NO_SPLIT, SPLITS, Row, choose_split

EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"))
Entry = os.DirEntry[str]


def is_here(place: Path) -> bool:
    """Whether a folder holds image files at any depth."""
    return place.is_dir() and _holds_images(place)


class Folder:
    """Rows in the order of a sorted walk. Hidden names are skipped, and linked folders are not followed."""

    kind = "folder"

    def __init__(self, root: Path, split: str | None) -> None:
        self.passed_over = Counter[str]()
        self.root, self.split = _choose(root, split)
        self.classes = _classes(self.root)

    def rows(self) -> Iterator[Row]:
        """Key and path are the file's path below the root; the label is the place of its top folder in `classes`."""
        self.passed_over.clear()
        if not self.classes:
            yield from self._walk(self.root, NO_LABEL)
        for entry in _entries(self.root) if self.classes else ():
            self._pass_over(entry)
        for label, name in enumerate(self.classes):
            yield from self._walk(self.root / name, label)

    def _walk(self, folder: Path, label: int) -> Iterator[Row]:
        for entry in self._images(folder):
            key = Path(entry.path).relative_to(self.root).as_posix()
            try:
                yield Row(key, key, 0, entry.stat().st_size, label)
            except OSError as err:
                raise UsageError(f"{entry.path}: {err.strerror}; expected an image file: mend or remove it") from err

    def _images(self, folder: str | os.PathLike[str]) -> Iterator[Entry]:
        for entry in _entries(folder):
            if _is_image(entry):
                yield entry
            elif _is_folder(entry):
                yield from self._images(entry)
            else:
                self._pass_over(entry)

    def _pass_over(self, entry: Entry) -> None:
        if entry.is_dir() or entry.name.startswith("."):
            return
        extension = os.path.splitext(entry.name)[1].lower()
        self.passed_over[extension or "file without extension"] += 1

    def read(self, row: Row) -> bytes:
        """The file's bytes."""
        data = (self.root / row.path).read_bytes()
        if len(data) != row.size:
            raise OSError(f"{self.root / row.path} has {len(data)} bytes, it had {row.size} when the rows were listed")
        return data


def _choose(root: Path, split: str | None) -> tuple[Path, str]:
    """The folder whose sub-folders are classes, and the split's name.

    Without a split asked, sub-folders are taken for splits only if all of them have such names: `train` beside
    `airplane` and `car` is a class. Asking again for the split that was chosen chooses the same.
    """
    split = None if split == NO_SPLIT else split
    if split is not None and (root / split).is_dir():
        return root / split, split
    names = [entry.name for entry in _entries(root) if _is_folder(entry) and _holds_images(entry)]
    if names and set(names) <= set(SPLITS):
        chosen = choose_split(names, split, str(root))
        return root / chosen, chosen
    return root, NO_SPLIT if split is None else choose_split([], split, str(root))


def _classes(root: Path) -> tuple[str, ...]:
    entries = _entries(root)
    classes = tuple(entry.name for entry in entries if _is_folder(entry) and _holds_images(entry))
    loose = [entry.name for entry in entries if _is_image(entry)]
    if classes and loose:
        raise UsageError(
            f"{root} holds images ({loose[0]}, {len(loose)} in all) beside folders of images ({classes[0]}); expected "
            "class folders only, or images only: move one of them away"
        )
    return classes


def _is_folder(entry: Entry) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _is_image(entry: Entry) -> bool:
    stem, dot, extension = entry.name.rpartition(".")
    named = bool(stem and dot) and extension.lower() in EXTENSIONS and stem[0] != "."
    return named and (entry.is_file() or not os.path.exists(entry.path))  # a broken link is told of, a pipe passed over


def _entries(folder: str | os.PathLike[str]) -> list[Entry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _holds_images(folder: str | os.PathLike[str]) -> bool:
    with os.scandir(folder) as entries:
        return any(_is_image(entry) or (_is_folder(entry) and _holds_images(entry)) for entry in entries)
