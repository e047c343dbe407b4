"""WebDataset tars."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from boomgen import places
from boomgen.errors import UsageError
from boomgen.places import Place
from boomgen.sources.base import NO_LABEL, NO_SPLIT, SPLITS, Row, caption_of, choose_split
from boomgen.untrusted import read_json, read_yaml

EXTENSIONS = frozenset(("png", "jpg", "jpeg", "webp", "bmp"))
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key, fields: the key ends at the first dot of the last path part
MAX_TEXT = 2**24  # bytes of a .cls, .json or .txt
MAX_CARD = 2**22  # bytes
EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
MAX_HEADER = 2**20  # bytes of an extended header
SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(SPLITS)})(?=[-_.\d])")


class Member(NamedTuple):
    """One file of a sample."""

    key: str
    field: str
    offset: int
    size: int
    text: bytes  # the content where the field is one to read, else empty


class _Header(tarfile.TarInfo):
    """A header of a tar. `tarfile` itself goes back, for ever, on a negative size, and reads any length of names."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENDED and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header that claims {header.size} bytes")
        return header


def is_here(place: Place) -> bool:
    """Whether a path is a tar or a folder of tars."""
    return bool(_tars(place))


class Tars:
    """A tar, or a folder of tars (directly or in `data/`). Nothing is ever unpacked: an image is a range of bytes."""

    kind = "webdataset"

    def __init__(self, place: Place, split: str | None, captions: bool = False) -> None:
        self.passed_over = Counter[str]()
        self._read = ("cls", "json", "txt") if captions else ("cls", "json")
        tars = _tars(place)
        self.root = place.parent if tars == [place] else place
        self.tars, self.split = _choose(tars, split, place)
        self.classes = _card_classes(self.root) or _card_classes(self.root.parent)

    def rows(self) -> Iterator[Row]:
        """One row per sample; offset and size are those of the image's bytes in its tar."""
        self.passed_over.clear()
        for tar in self.tars:
            yield from list(self._samples(tar))  # all of a tar before its first: members may come again at its end

    def _samples(self, tar: Place) -> Iterator[Row]:
        name, seen = str(tar)[len(str(self.root)) :].lstrip("/"), set[str]()
        for key, members in groupby(_members(tar, self._read), lambda member: member.key):
            if key in seen:
                raise UsageError(
                    f"{tar}: the members of sample {key!r} are not next to each other; expected a WebDataset tar: "
                    "write it again sorted by name (tar --sort=name)"
                )
            seen.add(key)
            row = _row(tar, name, key, list(members))
            if row is not None:
                yield row
            else:
                self.passed_over["sample without an image"] += 1

    def read(self, row: Row) -> bytes:
        """The image member's bytes."""
        return read(self.root, row)


def read(root: Place, row: Row) -> bytes:
    """The bytes of an image in a tar below `root`."""
    data = places.read(root / row.path, row.offset, row.size)
    if len(data) != row.size:
        raise OSError(f"{root / row.path} ends inside {row.key}: {len(data)} of {row.size} bytes")
    return data


def _tars(place: Place) -> list[Place]:
    if place.suffix == ".tar" and places.is_file(place):
        return [place]
    return [
        folder / name for folder in (place, place / "data") for name in places.names(folder) if name.endswith(".tar")
    ]


def _choose(tars: list[Place], split: str | None, place: Place) -> tuple[list[Place], str]:
    """The tars of one split, known by their names; all of them where no name tells a split."""
    split = None if split == NO_SPLIT else split
    asked = [tar for tar in tars if tar.name.startswith(f"{split}-")]
    if split is not None and asked and tars != [place]:
        return asked, split
    named = [(tar, match[1]) for tar in tars if (match := SPLIT.search(tar.name))]
    if split is None and (not named or tars == [place]):
        return tars, NO_SPLIT
    chosen = choose_split(sorted({name for _, name in named}), split, str(place))
    return [tar for tar, name in named if name == chosen], chosen


def _members(tar: Place, read: tuple[str, ...]) -> Iterator[Member]:
    """The regular files of a tar that belong to samples, in order, with the texts of the fields to `read`."""
    try:
        with places.opened(tar) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else every header of the tar stays in memory
                if info.size < 0 or info.issparse():
                    raise tarfile.ReadError(f"{info.name!r} is sparse or of negative size")
                match = NAME.fullmatch(info.name)
                if info.isreg() and match and not re.match(r"__[^/]*__($|/)", info.name):
                    field = match[2].lower()
                    text = _text(archive, info) if field in read else b""
                    yield Member(match[1], field, info.offset_data, info.size, text)
            end = archive.offset
    except Exception as err:  # whatever `tarfile` makes of odd bytes
        if isinstance(err, OSError) and not isinstance(tar, Path):
            raise  # the server's fault, not the tar's
        line = " ".join(str(err).split()) or type(err).__name__
        raise UsageError(f"{tar}: {line}; expected a whole, uncompressed tar: fetch or write it again") from err
    _require_end(tar, end)


def _text(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    if info.size > MAX_TEXT:
        raise tarfile.ReadError(f"{info.name!r} has {info.size} bytes, at most {MAX_TEXT} are read")
    file = archive.extractfile(info)
    return file.read() if file else b""


def _require_end(tar: Place, end: int) -> None:
    """tarfile takes a cut between two members, or a damaged header, for the end of the archive."""
    if places.read(tar, end, tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise UsageError(
            f"{tar} is truncated or damaged at byte {end}, no end-of-archive block; fetch or write it again"
        )


def _row(tar: Place, name: str, key: str, members: list[Member]) -> Row | None:
    images = [member for member in members if member.field.rpartition(".")[2] in EXTENSIONS]
    if len(images) > 1:
        fields = ", ".join(image.field for image in images)
        raise UsageError(
            f"{tar}: sample {key!r} holds {len(images)} images ({fields}), expected one: write it with one"
        )
    if not images:
        return None
    caption = next((caption_of(member.text) for member in members if member.field == "txt"), "")
    return Row(key, name, images[0].offset, images[0].size, _label(tar, key, members), caption)


def _label(tar: Place, key: str, members: list[Member]) -> int:
    """From .cls, else from "cls" or "label" in .json, else NO_LABEL."""
    texts = {member.field: member.text for member in members}
    try:
        if "cls" in texts:
            return int(texts["cls"])
        record = read_json(texts.get("json", b"{}"))
    except ValueError as err:
        raise UsageError(f"{tar}: sample {key!r} has no readable label ({err}); expected an integer in .cls") from err
    values = [record.get(field) for field in ("cls", "label")] if isinstance(record, dict) else []
    return next((value for value in values if type(value) is int), NO_LABEL)


def _card_classes(folder: Place) -> tuple[str, ...]:
    """The class names that a data set card (README.md) gives its feature `cls`; () where it gives none."""
    try:
        text = places.read(folder / "README.md", 0, MAX_CARD).decode()
        card = read_yaml(text.split("---\n")[1]) if text.startswith("---\n") else {}
    except places.StorageError:
        raise  # it may name them
    except (OSError, ValueError, IndexError):
        return ()
    infos = card.get("dataset_info", {}) if isinstance(card, dict) else {}
    try:
        features = (infos[0] if isinstance(infos, list) else infos)["features"]
        names: Any = next(f["dtype"]["class_label"]["names"] for f in features if f["name"] == "cls")
        found = [names[i] for i in sorted(names, key=int)] if isinstance(names, dict) else list(names)
    except (KeyError, IndexError, TypeError, ValueError, StopIteration):
        return ()
    return tuple(found) if all(isinstance(name, str) for name in found) else ()
