"""What people really have for images: odd files and odd names. Each ends as a row that says what became of it."""

import io
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boomgen import images, manifest
from boomgen.cli import main
from boomgen.verify import remake

from .conftest import Complaint, PlanTiny
from .finished import finish, made, pixel_hash, samples

GREY = np.random.default_rng(3).integers(0, 256, (8, 8), np.uint8)


def stored(pixels: Any, kind: str = "png", mode: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, kind, **options)
    return out.getvalue()


# Images ------------------------------------------------------------------------------------------------------------

JPEG = stored(np.kron(GREY, np.ones((9, 9), np.uint8)), "jpeg")
FRAMES = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
HEADER = b"IHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
BOMB = stored(GREY)[:12] + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + stored(GREY)[33:]

TOO_LARGE = "Image size (2500000000 pixels) exceeds limit of 178956970 pixels, could be decompression bomb DOS attack."

GOOD = {
    "grey": stored(GREY),
    "16-bit": stored(GREY.astype(np.uint16) << 8),
    "palette": stored(GREY, mode="P"),
    "animated.gif": stored(FRAMES[0], "gif", save_all=True, append_images=FRAMES[1:]),
    "animated.webp": stored(FRAMES[0].convert("RGB"), "webp", save_all=True, append_images=FRAMES[1:], lossless=True),
    "rgba": stored(np.dstack([GREY] * 3 + [np.full_like(GREY, 255)])),
    "rgb": stored(np.dstack([GREY] * 3)),
    "bmp": stored(GREY, "bmp"),
    "tiff": stored(GREY, "tiff"),
    "cmyk.tiff": stored(Image.merge("CMYK", [Image.fromarray(255 - GREY)] * 3 + [Image.new("L", (8, 8))]), "tiff"),
}
BAD = {
    "empty.png": (b"", "undecodable", "empty file"),
    "text.jpg": (b"this is no picture", "undecodable", "not an image of a format that boomgen reads"),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "undecodable", "image file is truncated ("),
    "cut.png": (stored(GREY)[:60], "undecodable", ""),
    "bomb.png": (BOMB, "too-large", TOO_LARGE),
}


def test_every_image_ends_as_a_row(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    """Good ones, at t_boom 0, come out as they are upright and in grey; bad ones fail with their reason."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, data in GOOD.items():
        (photos / (name if "." in name else f"{name}.png")).write_bytes(data)
    exif = Image.Exif()
    exif[0x0112] = 6
    (photos / "turned.png").write_bytes(stored(np.rot90(GREY), exif=exif))
    for name, (data, *_) in BAD.items():
        (photos / name).write_bytes(data)
    run = finish(plan_tiny(tmp_path / "run", mode="augment", dataset=str(photos), t_boom="0"))
    rows = {row["source_key"]: row for row in manifest.read(run.manifest).to_pylist()}
    assert len(rows) == len(GOOD) + len(BAD) + 1
    for name, row in rows.items():
        if name in BAD:
            _, reason, detail = BAD[name]
            assert (row["status"], row["reason"]) == ("failed", reason), name
            assert row["detail"].startswith(detail), row["detail"]
            assert row["output_sha256"] == ""
        else:
            assert row["status"] == "ok", (name, row["detail"])
            assert row["pixel_sha256"] == pixel_hash(GREY), name
    again = finish(plan_tiny(tmp_path / "again", mode="augment", dataset=str(photos), t_boom="0"))
    assert made(again) == made(run)
    assert list(remake(run, len(rows))) == []


def test_failed_rows_are_listed_with_their_reasons(
    plan_tiny: PlanTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.png").write_bytes(stored(GREY))
    (photos / "bomb.png").write_bytes(BOMB)
    (photos / "notes.txt").write_text("a")
    (photos / "phone.HEIC").write_bytes(b"b")
    run = plan_tiny(tmp_path / "run", dataset=str(photos))
    assert main(["resume", str(run.path), "--device", "cpu", "--workers", "1"]) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"rows      1 ok, 1 failed (too-large) of 2; which: boomgen logs {run.path} --failed"
    assert told[1:3] == ["labels    none found", "left out  1 .heic, 1 .txt (no images that boomgen reads)"]
    assert len(told) <= 10
    assert main(["logs", str(run.path), "--failed"]) == 0
    assert capsys.readouterr().out in [f"row {row} (bomb.png): too-large: {TOO_LARGE}\n" for row in (0, 1)]


def test_a_file_too_large_is_not_read(plan_tiny: PlanTiny, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "good.png").write_bytes(stored(GREY))
    with (photos / "hole.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    run = finish(plan_tiny(tmp_path / "run", mode="augment", dataset=str(photos)))
    rows = {row["source_key"]: row for row in manifest.read(run.manifest).to_pylist()}
    assert rows["hole.png"]["detail"] == "1073741825 bytes, at most 1073741824 are read"


# Names -------------------------------------------------------------------------------------------------------------

NAMES = [
    "plain.png",
    "dots.in.the.name.png",
    "two..dots.png",
    " spaces  .png",
    "deep/er/er/x.png",
    "deep/er.er/x.png",
    "😀👩‍👩‍👧.png",
    "ünïcödé.png",
    "u\u0308.png",  # the same letter as ü, written otherwise
    "ü.png",
    "line\nbreak.png",
    "\x01\x1b[31m\x7f.png",
    "'quotes\".png",
    "-rf.png",
    "*?[].png",
    "a\\b.png",
    f"{'é' * 125}!.png",  # 255 bytes
    "CON.PNG",
]


@pytest.fixture
def oddly_named(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stored(np.full((8, 8), number, np.uint8)))
    assert max(len(os.fsencode(Path(name).name)) for name in NAMES) == 255
    return tmp_path / "odd"


@pytest.mark.parametrize("mode", ["augment", "anonymize"])
def test_any_name_is_a_key(oddly_named: Path, plan_tiny: PlanTiny, tmp_path: Path, mode: str) -> None:
    for flat in [path for path in oddly_named.iterdir() if path.is_file()]:
        (oddly_named / "flat").mkdir(exist_ok=True)
        flat.rename(oddly_named / "flat" / flat.name)
    t_boom = "0" if mode == "augment" else "0.4"
    run = finish(plan_tiny(tmp_path / "run", mode=mode, dataset=str(oddly_named), t_boom=t_boom))
    rows = {row["source_key"].removeprefix("flat/"): row for row in manifest.read(run.manifest).to_pylist()}
    assert rows.keys() == set(NAMES)
    assert len(samples(run)) == len(NAMES)
    if mode == "augment":
        for number, name in enumerate(NAMES):
            assert rows[name]["pixel_sha256"] == pixel_hash(np.full((8, 8), number, np.uint8))


def test_a_name_that_is_no_text_is_named(tmp_path: Path, complaint: Complaint, tiny_model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Path(os.fsdecode(os.fsencode(photos) + b"/\xff\xfe.png")).write_bytes(stored(GREY))
    said = complaint("plan", "--dataset", photos, "--model", tiny_model, "--t-boom", "0.4", "--out", tmp_path / "run")
    assert said == "the name '\\udcff\\udcfe.png' is not UTF-8; rename the file"
