"""The scanner's own power: a planted word is found in every place, in every encoding, and nothing else is."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.scanner import forms, leaks

WORD = "jane_doe.0017"
SECRET = bytes(range(100, 132))

ENCODINGS = {
    "raw": lambda word: word.decode("latin-1"),
    "hex": lambda word: word.hex(),
    "HEX": lambda word: word.hex().upper(),
    "base64 aligned": lambda word: base64.b64encode(word).decode(),
    "base64 after 1": lambda word: base64.b64encode(b"x" + word + b"yz").decode(),
    "base64 after 2": lambda word: base64.b64encode(b"xy" + word + b"z").decode(),
    "base64 url": lambda word: base64.urlsafe_b64encode(b"x" + word).decode(),
    "utf-16": lambda word: word.decode("latin-1").encode("utf-16-le").decode("latin-1"),
    "UTF-16": lambda word: word.decode("latin-1").encode("utf-16-be").decode("latin-1"),
}


def picture(**how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, how.pop("format", "png"), **how)
    return out.getvalue()


def text_chunk(text: str) -> bytes:
    info = PngInfo()
    info.add_text("Comment", text)
    return picture(pnginfo=info)


def zipped_chunk(text: str) -> bytes:
    info = PngInfo()
    info.add_text("Comment", text, zip=True)
    return picture(pnginfo=info)


def zipped_unicode_chunk(text: str) -> bytes:
    info = PngInfo()
    info.add_itxt("Comment", text, zip=True)
    return picture(pnginfo=info)


def exif(text: str, file_format: str = "png") -> bytes:
    tags = Image.Exif()
    tags[0x010E] = text
    return picture(format=file_format, exif=tags)


def pixels(text: str) -> bytes:
    row = np.frombuffer(text.encode("latin-1").ljust(256, b" "), np.uint8)
    out = io.BytesIO()
    Image.fromarray(row[None]).save(out, "png")
    return out.getvalue()


IN_TAR = {
    "tEXt": lambda text: {"png": text_chunk(text)},
    "zTXt": lambda text: {"png": zipped_chunk(text)},
    "iTXt": lambda text: {"png": zipped_unicode_chunk(text)},
    "EXIF": lambda text: {"png": exif(text)},
    "EXIF of webp": lambda text: {"webp": exif(text, "webp")},
    "comment of jpg": lambda text: {"jpg": picture(format="jpeg", comment=text.encode("latin-1"))},
    "pixels": lambda text: {"png": pixels(text)},
    "behind the picture": lambda text: {"png": picture() + text.encode("latin-1")},
    "json member": lambda text: {"json": json.dumps({"class_name": text}).encode()},
    "json name": lambda text: {"json": json.dumps({text: 1}).encode()},
    "cls member": lambda text: {"cls": text.encode("latin-1")},
    "member name": lambda text: {f"{text}.png": picture()},
}
NO_NUL = {"member name", "file name", "owner"}  # places that cannot hold a NUL
BESIDE = ("README head", "README text", "_info.json", "file name", "pax header", "global pax header", "owner")


def write(folder, place: str, text: str) -> None:
    """A data set folder that is clean but for `text` in one place."""
    (folder / "data").mkdir(parents=True)
    head = yaml.safe_dump({"license": text if place == "README head" else "other"})
    body = text.encode("latin-1") if place == "README text" else b"words"
    (folder / "README.md").write_bytes(f"---\n{head}---\n".encode() + body)
    (folder / "_info.json").write_text(json.dumps({"splits": text if place == "_info.json" else ""}))
    name = f"{text.replace('/', '_')}.tar" if place == "file name" else "train.tar"
    more = {"pax_headers": {"comment": text}} if place == "global pax header" else {}
    members = IN_TAR[place](text) if place in IN_TAR else {"png": picture(), "cls": b"1"}
    with tarfile.open(folder / "data" / name, "w", format=tarfile.PAX_FORMAT, **more) as tar:
        for extension, data in members.items():
            member = tarfile.TarInfo(f"00000001.{extension}")
            member.size = len(data)
            if place == "pax header":
                member.pax_headers = {"comment": text}
            if place == "owner":
                member.uname = text
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("place", [*IN_TAR, *BESIDE])
def test_a_planted_word_is_found(place, tmp_path):
    for name, encode in ENCODINGS.items():
        if place in NO_NUL and name.lower() == "utf-16":
            continue
        folder = tmp_path / name
        write(folder, place, encode(WORD.encode()))
        assert {needle for _, needle in leaks(folder, [WORD, "john_smith.0023"])} == {WORD}, (place, name)


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if "16" not in name])
def test_planted_bytes_are_found(encoding, tmp_path):
    write(tmp_path / "planted", "iTXt" if encoding != "raw" else "tEXt", ENCODINGS[encoding](SECRET))
    assert {needle for _, needle in leaks(tmp_path / "planted", [SECRET, SECRET[::-1]])} == {SECRET}


def test_a_clean_folder_is_clean(tmp_path):
    write(tmp_path / "clean", "nowhere", WORD)
    assert not leaks(tmp_path / "clean", [WORD, SECRET])


def test_every_alignment_of_base64_is_a_form():
    for before in range(7):
        for behind in range(7):
            text = base64.b64encode(b"\xff" * before + SECRET + b"\xff" * behind)
            assert any(form in text for form in forms(SECRET))


def test_short_words_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="too short"):
        leaks(tmp_path, ["ab"])
