"""Looks for telling words in a data set folder as an attacker would: everything decoded, every encoding tried."""

import base64
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from PIL import Image

Needle = str | bytes
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP")


def forms(needle: Needle) -> set[bytes]:
    """How a word may be written: raw, hexadecimal, base64 at its three alignments (both alphabets), UTF-16."""
    raw = needle.encode() if isinstance(needle, str) else needle
    found = {raw, raw.hex().encode(), raw.hex().upper().encode()}
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + raw)
        # the first characters also hold the bytes before the word, the last ones those behind it
        inner = text[(0, 2, 3)[shift] : len(text) - (0, 3, 2)[(len(raw) + shift) % 3]]
        found |= {inner, inner.replace(b"+", b"-").replace(b"/", b"_")}
    if isinstance(needle, str):
        found |= {needle.encode("utf-16-le"), needle.encode("utf-16-be")}
    return found


def leaks(folder: Path, needles: Iterable[Needle]) -> set[tuple[str, Needle]]:
    """Every (place, needle) that is found below a folder."""
    every = [(needle, forms(needle)) for needle in needles]
    assert all(len(form) >= 6 for _, all_forms in every for form in all_forms), "too short: found by chance"
    return {
        (place, needle)
        for place, data in contents(folder)
        for needle, all_forms in every
        if any(form in data for form in all_forms)
    }


def contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder, its name, and whatever its format hides."""
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        yield f"name of {place}", place.encode()
        if path.is_file():
            data = path.read_bytes()
            yield place, data
            yield from _decoded(place, data)


def _decoded(place: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    kind = place.rpartition(".")[2]
    if kind == "tar":
        yield from _tar(place, data)
    elif kind == "json":
        yield place, json.dumps(json.loads(data), ensure_ascii=False).encode()
        yield from ((place, text.encode("utf-8", "surrogatepass")) for text in _strings(json.loads(data)))
    elif kind == "md":
        head = data.decode("utf-8", "replace").split("---\n")[1]
        yield from ((place, text.encode("utf-8", "surrogatepass")) for text in _strings(yaml.safe_load(head)))
    elif kind == "png":
        yield from _png(place, data)
    if kind in ("png", "jpg", "webp"):
        picture = Image.open(io.BytesIO(data))
        yield place, repr([*picture.info.items(), *picture.getexif().items()]).encode()
        yield place, picture.tobytes()


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from (*_strings(name), *_strings(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    else:
        yield str(value)


def _tar(place: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        yield place, repr(tar.pax_headers).encode()
        for member in tar:
            inside = f"{place}:{member.name}"
            header = [member.name, member.linkname, member.uname, member.gname, *_strings(dict(member.pax_headers))]
            yield f"header of {inside}", "\0".join(header).encode("utf-8", "surrogateescape")
            if member.isfile():
                content = (tar.extractfile(member) or io.BytesIO()).read()
                yield inside, content
                yield from _decoded(inside, content)


def _png(place: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Text chunks, decompressed."""
    offset = 8
    while offset < len(data):
        (size,) = struct.unpack(">I", data[offset : offset + 4])
        kind, body = data[offset + 4 : offset + 8], data[offset + 8 : offset + 8 + size]
        if kind in PNG_TEXT:
            yield place, body + _inflated(body)
        offset += 12 + size


def _inflated(body: bytes) -> bytes:
    """The first zlib stream in a chunk, b'' where there is none."""
    for start in range(len(body)):
        if body[start : start + 1] == b"\x78":
            try:
                return zlib.decompress(body[start:])
            except zlib.error:
                continue
    return b""
