"""Opening of image files: upright, and as RGB."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from torchfuse.data.samples import Media
from torchfuse.errors import DataError

__all__ = ["image_size", "open_image", "to_rgb"]

_ORIENTATION: Final = 0x0112  # the EXIF tag
_SIDEWAYS: Final = (5, 6, 7, 8)  # its values where width and height are exchanged


def open_image(source: str | Path | Media) -> Image.Image:
    """Open an image as RGB, upright.

    The EXIF orientation is applied, 16 bits are scaled to 8, and transparency is put on white.

    Args:
        source: a path, or an image of a sample.

    Raises:
        DataError: if the file is missing, damaged or no image, or if its values have no known range
            (mode ``F``, or ``I`` beyond 16 bits).
    """
    with _opened(source) as image:
        return to_rgb(_to_eight_bits(ImageOps.exif_transpose(image)))


def image_size(source: str | Path | Media) -> tuple[int, int]:
    """Return height and width of an image, upright, from the head of its file.

    Args:
        source: a path, or an image of a sample.

    Raises:
        DataError: if the file is missing, or no image.
    """
    with _opened(source) as image:
        if image.format == "TIFF":
            image.load()  # which applies the orientation, and takes it out of the EXIF data
        sides = image.height, image.width
        return sides[::-1] if image.getexif().get(_ORIENTATION) in _SIDEWAYS else sides


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, as transformers' processors do.

    Transparency is put on white. More than 8 bits are clipped at 255; ``open_image`` scales them.
    """
    if "A" in image.getbands() or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


@contextmanager
def _opened(source: str | Path | Media) -> Iterator[Image.Image]:
    """Open a file with PIL; all errors, those of decoding too, become DataErrors that name it."""
    try:
        with Image.open(_file(source)) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{source} is no image that can be opened.") from error
    except Exception as error:  # PIL's readers raise many kinds on damaged files
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or repr(error)
        raise DataError(f"The image {source} cannot be opened: {reason}.") from error


def _file(source: str | Path | Media) -> str | Path | io.BytesIO:
    if not isinstance(source, Media):
        return source
    if source.path is not None and source.span is None:
        return source.path
    return io.BytesIO(source.read())


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale more than 8 bits, which PIL would clip at 255."""
    if image.getbands() not in {("I",), ("F",)}:
        return image
    levels = np.asarray(image)
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
        raise ValueError(f"its mode {image.mode} has no known range, save it with 8 or 16 bits")
    return Image.fromarray(((levels.astype(np.int32) + 128) // 257).astype(np.uint8))
