"""Images come in upright, in the model's channels and size, and go out as they came."""

import io
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from boomgen import images
from boomgen.errors import RowError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 7), np.uint8)


def stored(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_pixels_of_lossless_files_and_arrays_come_in_as_they_are() -> None:
    for raw in (COLOUR, stored(Image.fromarray(COLOUR)), stored(Image.fromarray(COLOUR), "webp", lossless=True)):
        np.testing.assert_array_equal(images.decode(raw, 3), COLOUR)
    for raw in (GREY, stored(Image.fromarray(GREY))):
        np.testing.assert_array_equal(images.decode(raw, 1), GREY[..., None])
        np.testing.assert_array_equal(images.decode(raw, 3), np.repeat(GREY[..., None], 3, 2))


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    turned = images.decode(stored(Image.fromarray(COLOUR), exif=exif), 3)
    np.testing.assert_array_equal(turned, np.rot90(COLOUR, -1))


@pytest.mark.parametrize("exif", [b"MM\0*", b"II", b"nonsense" * 9, b"MM\0+\0\x08\0\0"])
def test_exif_that_cannot_be_read_costs_no_row(exif: bytes) -> None:
    """Pillow raises struct.error, SyntaxError and others for these."""
    np.testing.assert_array_equal(images.decode(stored(Image.fromarray(COLOUR), exif=exif), 3), COLOUR)


def test_lack_of_memory_is_the_machines_fault_and_any_other_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, seen in ((MemoryError(), MemoryError), (struct.error("x"), RowError), (TypeError("x"), RowError)):
        monkeypatch.setattr(images, "_flat", Mock(side_effect=error))
        with pytest.raises(seen):
            images.decode(stored(Image.fromarray(COLOUR)), 3)


def test_alpha_lies_on_white() -> None:
    rgba = np.dstack([COLOUR, np.zeros((5, 7), np.uint8)])
    rgba[0, 0, 3] = 255
    flat = images.decode(stored(Image.fromarray(rgba)), 3)
    np.testing.assert_array_equal(flat[0, 0], COLOUR[0, 0])
    assert (flat.reshape(-1, 3)[1:] == 255).all()


def test_palette_and_cmyk_become_rgb_and_deep_grey_keeps_its_high_byte() -> None:
    palette = Image.fromarray(COLOUR).quantize(256)
    np.testing.assert_array_equal(images.decode(stored(palette), 3), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    np.testing.assert_array_equal(images.decode(stored(cmyk, "tiff"), 3), np.asarray(cmyk.convert("RGB")))
    deep = Image.fromarray(GREY.astype(np.uint16) << 8 | 0x7F)
    np.testing.assert_array_equal(images.decode(stored(deep), 1)[..., 0], GREY)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    animated = stored(frames[0], "png", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.decode(animated, 3), COLOUR)


@pytest.mark.parametrize("raw", [b"", b"no image", stored(Image.fromarray(COLOUR))[:60], b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_a_failed_row(raw: bytes) -> None:
    with pytest.raises(RowError) as caught:
        images.decode(raw, 3)
    assert caught.value.reason == "undecodable"
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header() -> None:
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(RowError) as caught:
        images.decode(bomb, 1)
    assert caught.value.reason == "too-large"


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (1, 8), (3, 20), (40, 2), (100, 100)])
def test_pad_never_enlarges_and_is_undone(height: int, width: int) -> None:
    pixels = RNG.integers(1, 256, (height, width, 1), np.uint8)
    square, box = images.fit(pixels, 8, "pad")
    assert square.shape == (8, 8, 1)
    back = images.unfit(square, box)
    assert max(back.shape[:2]) <= 8
    if max(height, width) <= 8:
        np.testing.assert_array_equal(back, pixels)
        assert np.count_nonzero(square) == height * width


def test_crop_takes_the_centre_and_leaves_a_fitting_image_alone() -> None:
    exact = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    square, box = images.fit(exact, 8, "crop")
    np.testing.assert_array_equal(square, exact)
    np.testing.assert_array_equal(images.unfit(square, box), exact)
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    np.testing.assert_array_equal(images.fit(wide, 8, "crop")[0], np.full((8, 8, 3), 200, np.uint8))
    assert images.fit(np.zeros((31, 97, 3), np.uint8), 8, "crop")[0].shape == (8, 8, 3)


def test_a_long_strip_is_cut_before_it_is_enlarged() -> None:
    """Enlarged whole, it would take 15 GB."""
    strip = np.zeros((1, 10_000_000, 3), np.uint8)
    strip[0, 4_999_999:5_000_001] = 200
    square, _ = images.fit(strip, 32, "crop")
    assert square.shape == (32, 32, 3)
    assert (square == 200).all()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_lossless_formats_give_the_pixels_back_and_the_same_bytes_twice(kind: str) -> None:
    file = images.encode(COLOUR, kind)
    assert file == images.encode(COLOUR.copy(), kind)
    np.testing.assert_array_equal(images.decode(file, 3), COLOUR)
    np.testing.assert_array_equal(images.decode(images.encode(GREY[..., None], kind), 1)[..., 0], GREY)


def test_jpg_is_near() -> None:
    smooth = np.tile(np.arange(64, dtype=np.uint8)[:, None, None], (1, 64, 3))
    assert np.abs(images.decode(images.encode(smooth, "jpg"), 3).astype(int) - smooth).max() <= 4
