"""Hugging Face data sets: saved on disk, a folder of Parquet files, or an id on the Hub."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from boomgen import hub
from boomgen.errors import RowError, UsageError
from boomgen.sources.base import NO_LABEL, NO_SPLIT, OTHER_CLASS, Columns, Row, caption_of, choose_split

LABEL_NAMES = ("label", "labels", "fine_label", "cls")
CAPTION_NAMES = ("caption", "text", "prompt")
WORDS = ("string", "large_string")
BATCH = 10_000
MAX_WORDS = 100_000  # different words in a column of labels


def is_saved(place: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))


def is_parquet(place: Path) -> bool:
    """Whether a folder holds Parquet files other than the metadata of an image folder."""
    files = (path for pattern in ("*.parquet", "*/*.parquet") for path in place.glob(pattern))
    return place.is_dir() and any(path.name != "metadata.parquet" for path in files)


class Table:
    """One split of a `datasets.Dataset`, with its images left encoded.

    Its cells may name files outside its own folder and the caches only if it was saved with save_to_disk: a
    stranger's could name private ones.
    """

    kind = "huggingface"

    def __init__(
        self,
        data: Any,
        split: str,
        columns: Columns,
        where: str,
        revision: str | None = None,
        saved_here: bool = False,
    ) -> None:
        from datasets import ClassLabel, Image, Value

        self.split, self.revision, self._where = split, revision, where
        self.passed_over = Counter[str]()
        self._roots = [Path("/")] if saved_here else [Path(where).resolve(), *_caches()]
        self._image = _image_column(data.features, columns.image, where)
        self._label = _label_column(data.features, columns.label, where)
        caption = _caption_column(data.features, columns.caption, where) if columns.captions else None
        feature = data.features[self._label] if self._label else None
        self.classes = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
        if self._label and isinstance(feature, Value) and feature.dtype in WORDS:
            self.classes = _words(data, self._label, where)
        self._number = {name: number for number, name in enumerate(self.classes)}
        self._place = _places(self.classes, columns.numbers, where)
        self.classes = tuple(self.classes[number] for number in self._place) or self.classes
        data = data.with_format(None)
        self._images = data.select_columns([self._image]).cast_column(self._image, Image(decode=False))
        self._labels = data.select_columns([self._label]) if self._label else None
        self._captions = data.select_columns([caption]) if caption else None

    def rows(self) -> Iterator[Row]:
        """The offset is the row number; sizes are not known."""
        self.passed_over.clear()
        for i, (label, caption) in enumerate(zip(self._each_label(), self._each_caption(), strict=True)):
            place = self._place.get(label, NO_LABEL) if self._place else label
            if place == NO_LABEL != label:
                self.passed_over[OTHER_CLASS] += 1
            else:
                yield Row(f"{self.split}-{i:08d}", "", i, -1, place, caption)

    def _each_label(self) -> Iterator[int]:
        if self._labels is None:
            yield from repeat(NO_LABEL, len(self._images))
            return
        for batch in self._labels.iter(batch_size=BATCH):
            for label in batch[self._label]:
                yield self._number[label] if isinstance(label, str) else NO_LABEL if label is None else int(label)

    def _each_caption(self) -> Iterator[str]:
        if self._captions is None:
            yield from repeat("", len(self._images))
            return
        (column,) = self._captions.column_names
        for batch in self._captions.iter(batch_size=BATCH):
            yield from (caption_of(text or "") for text in batch[column])

    def read(self, row: Row) -> bytes:
        """RowError where the cell is empty."""
        if row.offset >= len(self._images):
            raise OSError(f"{self._where} has {len(self._images)} rows, it had {row.key} when the rows were listed")
        cell = self._images[row.offset][self._image]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise RowError("undecodable", f"{row.key} has no image in column {self._image!r}")
        data: bytes | None = cell["bytes"]
        if data is not None:
            return data
        path = Path(cell["path"]).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise RowError("undecodable", f"{row.key} names a file of this machine, which only a saved data set may")
        return path.read_bytes()


def _places(classes: tuple[str, ...], numbers: tuple[int, ...], where: str) -> dict[int, int]:
    """The label of each number that is wanted; empty where nothing need be chosen, or has been before."""
    if not numbers or len(classes) == len(numbers):
        return {}
    if len(classes) <= max(numbers):
        raise UsageError(
            f"{where} names {len(classes)} classes; expected {len(numbers)}, or all that they are chosen from: "
            "name the column by --label-column, or use the whole data set"
        )
    return {number: place for place, number in enumerate(numbers)}


def _words(data: Any, column: str, where: str) -> tuple[str, ...]:
    """The different words of a column, sorted; a batch of it is in memory at a time."""
    found = set[str]()
    for batch in data.select_columns([column]).with_format("arrow").iter(batch_size=BATCH):
        found.update(batch.column(column).drop_null().unique().to_pylist())
        if len(found) > MAX_WORDS:
            raise UsageError(
                f"{where}: column {column!r} holds more than {MAX_WORDS} different words; expected classes"
            )
    return tuple(sorted(found))


def _caches() -> list[Path]:
    """Where `datasets` unpacks what it fetched."""
    from datasets import config
    from huggingface_hub import constants

    places = (config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HOME, constants.HF_HUB_CACHE)
    return [Path(place).resolve() for place in places]


def open_saved(place: Path, split: str | None, columns: Columns) -> Table:
    """What Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    from datasets import DatasetDict, load_from_disk

    data = _tried(lambda: load_from_disk(str(place)), f"{place} is not readable", "save it again with save_to_disk")
    if not isinstance(data, DatasetDict):
        chosen = NO_SPLIT if split in (None, NO_SPLIT) else choose_split([], split, str(place))
        return Table(data, chosen, columns, str(place), saved_here=True)
    chosen = choose_split(list(data), split, str(place))
    return Table(data[chosen], chosen, columns, str(place), saved_here=True)


def open_parquet(place: Path, split: str | None, columns: Columns) -> Table:
    """A folder of Parquet files as the Hub lays them out (a downloaded copy)."""
    return _load(place, str(place), split, columns, "expected a data set as the Hub lays it out: download it again")


def open_hub(name: str, split: str | None, columns: Columns, commit: str | None) -> Table:
    """A data set on the Hub or in its cache, as owner/name[@REVISION]. `Table.revision` is the commit."""
    folder = hub.dataset(name, commit)
    remedy = "pass --data-dir with a local copy that `datasets` reads"
    return _load(folder, name, split, columns, remedy, folder.name)


def _load(place: Path, name: str, split: str | None, columns: Columns, remedy: str, commit: str | None = None) -> Table:
    from datasets import disable_progress_bars, get_dataset_split_names, load_dataset, load_dataset_builder

    if not sys.stderr.isatty():
        disable_progress_bars()
    complaint = f"data set {name} does not load"
    _check_files(_tried(lambda: load_dataset_builder(str(place)), complaint, remedy).config.data_files, place, name)
    splits = _tried(lambda: get_dataset_split_names(str(place)), complaint, remedy)
    chosen = choose_split(splits, split, name)
    data = _tried(lambda: load_dataset(str(place), split=chosen), complaint, remedy)
    return Table(data, chosen, columns, name, commit)


def _check_files(files: Mapping[str, Iterable[str]] | None, place: Path, name: str) -> None:
    """A card may name any file of this machine, or a URL; `datasets` would read it."""
    for file in chain.from_iterable((files or {}).values()):
        path = os.path.normpath(file.rpartition("::")[2])  # a file in an archive is ARCHIVED::ARCHIVE
        if not Path(path).is_relative_to(place):
            raise UsageError(f"data set {name}: its card names {path}, which is not in it; expected files of its own")


def _tried(act: Callable[[], Any], complaint: str, remedy: str) -> Any:
    """`datasets` fails with a dozen exception types; to the user all of them are one line and a remedy."""
    try:
        return act()
    except Exception as err:
        raise UsageError(f"{complaint}: {hub.line(err)}; {remedy}") from err


def _image_column(features: Any, asked: str | None, where: str) -> str:
    from datasets import Image

    found: list[str] = [name for name, feature in features.items() if isinstance(feature, Image)]
    raw: list[str] = [
        name for name, feature in features.items() if getattr(feature, "dtype", "") in ("binary", "large_binary")
    ]
    if asked is None and found:
        return found[0]
    if asked is not None and asked in found + raw:
        return asked
    got = "no column of images" if asked is None else f"{asked!r} is not a column of images"
    raise UsageError(
        f"{where}: {got}; pass --image-column with one of {_named(found + raw)} (it has {_named(features)})"
    )


def _label_column(features: Any, asked: str | None, where: str) -> str | None:
    from datasets import ClassLabel, Value

    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    plain = {name: f.dtype for name, f in features.items() if isinstance(f, Value)}
    other = [name for name, kind in plain.items() if kind.lstrip("u").startswith("int") or kind in WORDS]
    if asked is None:
        whole = [name for name in LABEL_NAMES if name in other and plain[name] not in WORDS]  # words may be anything
        return next(iter(named + whole), None)
    if asked in named + other:
        return asked
    raise UsageError(
        f"{where}: {asked!r} is not a column of labels; pass --label-column with one of {_named(named + other)}"
    )


def _caption_column(features: Any, asked: str | None, where: str) -> str:
    words = [name for name, feature in features.items() if getattr(feature, "dtype", "") in WORDS]
    known = [asked] if asked is not None else CAPTION_NAMES
    found = next((name for name in known if name in words), None)
    if found is None:
        got = "no column of captions" if asked is None else f"{asked!r} is not a column of captions"
        raise UsageError(f"{where}: {got}; pass --caption-column with one of {_named(words)}, or drop {{caption}}")
    return found


def _named(names: Any) -> str:
    return ", ".join(names) or "none"
