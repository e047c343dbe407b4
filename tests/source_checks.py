"""What the tests of all sources share."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from boomgen.errors import UsageError
from boomgen.sources import open_source


def picture(value: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 2 * value, 0)).save(file, kind)
    return file.getvalue()


def refused(location: Path | str, split: str | None = None, **options: str) -> str:
    """The one line that opening and listing this source ends in."""
    with pytest.raises(UsageError) as caught:
        list(open_source(str(location), split, **options).rows())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(location: Path, split: str | None = None) -> list[tuple[str, int]]:
    """(key, label) of every row, after the checks that hold for every source."""
    source = open_source(str(location), split)
    rows = list(source.rows())
    assert rows == list(source.rows())
    again = open_source(str(location), source.split)
    assert (again.split, again.classes, list(again.rows())) == (source.split, source.classes, rows)
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.size in (-1, len(source.read(row))) for row in rows if source.kind != "idx")
    return [(row.key, row.label) for row in rows]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, Any]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, io.BytesIO(data)


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, data)
    return path
