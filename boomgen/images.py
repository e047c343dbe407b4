"""Between stored images and the model's pixels: decode, fit to the native size and back, encode."""

import contextlib
import io
import re
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from boomgen.errors import RowError
from boomgen.job import Job
from boomgen.sources.base import RawImage

MAX_PIXELS = 2**27
"""134 megapixels, below what Pillow itself refuses; more is refused by the header, before a pixel is decoded."""
MAX_BYTES = 2**30
"""Of an image file; a greater one is refused before it is read."""
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "GIF", "TIFF", "PPM", "ICO")
"""What is decoded, whatever a file's name is. Pillow knows more; one of them, EPS, starts a program."""
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "linear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's: pixel centres at halves. Only what is shrunk is antialiased, by all but nearest; cubic has a = -0.5."""
Pixels = NDArray[np.uint8]
"""(H, W, C) with C = 1 (grey) or 3 (RGB)."""


class Box(NamedTuple):
    """Where the content of an image lies inside the model's square, and its (height, width) outside if another."""

    left: int
    top: int
    width: int
    height: int
    out: tuple[int, int] | None = None


def decode(raw: RawImage, channels: int) -> Pixels:
    """The upright image as (H, W, channels).

    Alpha is laid on white, 16-bit grey is scaled to 8 bits, EXIF rotation is applied, the first frame is taken.

    Raises:
        RowError: undecodable or too-large; both would recur on every machine.
    """
    try:
        image = _open(raw)
        if image.width * image.height > MAX_PIXELS:
            raise RowError("too-large", f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} are decoded")
        pixels = np.asarray(_flat(_upright(image)).convert("L" if channels == 1 else "RGB"))
    except (RowError, MemoryError):  # another machine may have the memory
        raise
    except UnidentifiedImageError as err:
        raise RowError("undecodable", "not an image of a format that boomgen reads" if raw else "empty file") from err
    except Image.DecompressionBombError as err:
        raise RowError("too-large", str(err)) from err
    except Exception as err:  # decoders raise what they like, but follow from the bytes alone
        line = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(err).split()))  # a place in memory differs each time
        raise RowError("undecodable", line or type(err).__name__) from err
    return pixels.reshape(*pixels.shape[:2], channels)


def _open(raw: RawImage) -> Image.Image:
    return Image.open(io.BytesIO(raw), formats=FORMATS) if isinstance(raw, bytes) else Image.fromarray(raw)


def _upright(image: Image.Image) -> Image.Image:
    """Rotated as its EXIF says; as it is where that cannot be read, for the pixels may be good."""
    image.load()
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def _flat(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        return Image.fromarray((deep >> 8 if deep.max(initial=0) > 255 else deep).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    return image


def fitted(pixels: Pixels, size: int, job: Job) -> tuple[Pixels, Box]:
    """What a job gives the model of an image: (size, size, C), and where its content lies.

    Raises:
        RowError: too-large, an image whose enhanced version would have too many pixels.
    """
    if job.scale is None:
        return fit(pixels, size, str(job.fit))
    by = FILTERS[str(job.interpolation)]
    if job.degrade:
        return degrade(*fit(pixels, size, str(job.fit)), job.scale, FILTERS[job.degrade], by)
    return enlarge(pixels, size, str(job.fit), job.scale, by)


def degrade(square: Pixels, box: Box, scale: float, down: Image.Resampling, up: Image.Resampling) -> tuple[Pixels, Box]:
    """A fitted image whose content was shrunk by `scale` and brought back to its size."""
    low = _resize(unfit(square, box), max(1, round(box.height / scale)), max(1, round(box.width / scale)), down)
    return _laid(_resize(low, box.height, box.width, up), square.shape[0])


def enlarge(pixels: Pixels, size: int, how: str, scale: float, by: Image.Resampling) -> tuple[Pixels, Box]:
    """As `fit`, of an image that is to leave `scale` times greater.

    crop: the centre square is brought to `size`. pad: the image is enlarged by `scale`, by less where it would not fit.
    Where that is another size than `scale` asks for, `unfit` resizes the content.
    """
    if how == "crop":
        pixels = _centre(pixels)
    height, width = pixels.shape[:2]
    out = round(height * scale), round(width * scale)
    if out[0] * out[1] > MAX_PIXELS:
        raise RowError("too-large", f"{out[1]}x{out[0]} pixels when enlarged, at most {MAX_PIXELS} are made")
    factor = size / max(height, width)
    if how == "pad":
        factor = min(scale, factor)
    pixels = _resize(pixels, max(1, round(height * factor)), max(1, round(width * factor)), by)
    square, box = _laid(pixels, size)
    return square, box._replace(out=out)


def fit(pixels: Pixels, size: int, how: str) -> tuple[Pixels, Box]:
    """The image as (size, size, C), and where its content lies.

    crop: the centre square is cut out and resized to `size`. pad: never enlarged; what is larger is
    shrunk to fit, then black is added around it and cut off again by `unfit`.
    """
    height, width = pixels.shape[:2]
    if how == "crop":
        return _resize(_centre(pixels), size, size), Box(0, 0, size, size)
    scale = min(1.0, size / max(height, width))
    return _laid(_resize(pixels, max(1, round(height * scale)), max(1, round(width * scale))), size)


def _centre(pixels: Pixels) -> Pixels:
    """The centre square. It is cut before it is resized: a long strip, enlarged whole, would fill the memory."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _laid(pixels: Pixels, size: int) -> tuple[Pixels, Box]:
    """In the middle of a black square."""
    height, width = pixels.shape[:2]
    box = Box((size - width) // 2, (size - height) // 2, width, height)
    square = np.zeros((size, size, pixels.shape[2]), np.uint8)
    square[box.top : box.top + height, box.left : box.left + width] = pixels
    return square, box


def unfit(pixels: Pixels, box: Box) -> Pixels:
    """The content of a fitted image, without what was added around it, at the size that it leaves with."""
    content = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    return _resize(content, *box.out) if box.out else content


def _resize(pixels: Pixels, height: int, width: int, by: Image.Resampling = Image.Resampling.LANCZOS) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    resized = to_image(np.ascontiguousarray(pixels)).resize((width, height), by)
    return np.asarray(resized).reshape(height, width, pixels.shape[2])


def to_image(pixels: Pixels) -> Image.Image:
    """Pixels as a grey or RGB picture."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def encode(pixels: Pixels, file_format: str) -> bytes:
    """The image as a png, webp (lossless) or jpg (quality 95) file; the same bytes for the same library versions."""
    out = io.BytesIO()
    every: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 95}}
    to_image(np.ascontiguousarray(pixels)).save(
        out, "jpeg" if file_format == "jpg" else file_format, **every.get(file_format, {})
    )
    return out.getvalue()
