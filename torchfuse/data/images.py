"""Image files as the encoder wants them: its size, its mean and its deviation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from torchfuse.checkpoint.directory import read_json

__all__ = ["ImageTransform", "open_image"]

# PIL's numbers for them, which preprocessor files hold.
_RESAMPLE: Final = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(path: str | Path) -> Image.Image:
    """Open an image as RGB.

    Raises:
        ValueError: if it is missing or is no image, naming it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that can be opened.") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The image {path} cannot be opened: {reason}.") from error


class ImageTransform:
    """Resize, cut out the middle, normalise: what an encoder's own preprocessor does.

    Args:
        size: side of the square that the encoder takes, in pixels.
        mean: mean of each channel, of values in [0, 1].
        std: deviation of each channel.
        shorter_side: length to which the shorter side is resized before the middle is cut out; ``size``
            unless given. 0: the image is stretched to the square instead, and nothing is cut off.
        resample: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.

    Raises:
        ValueError: if a number or a name is out of range.

    Examples:
        >>> ImageTransform(8)(Image.new("RGB", (20, 10))).shape
        torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
        *,
        shorter_side: int | None = None,
        resample: str = "bicubic",
    ) -> None:
        shorter_side = size if shorter_side is None else shorter_side
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                "An image transform needs a positive size and three means and positive deviations, got "
                f"size={size}, mean={list(mean)}, std={list(std)}."
            )
        if 0 < shorter_side < size or shorter_side < 0 or resample not in _RESAMPLE.values():
            raise ValueError(
                f"shorter_side must be 0 or at least size={size}, got {shorter_side}; resample one of "
                f"{', '.join(_RESAMPLE.values())}, got {resample!r}."
            )
        self.size = size
        self.mean, self.std = list(mean), list(std)
        self.shorter_side = shorter_side
        self.resample = v2.InterpolationMode[resample.upper()]

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageTransform:
        """Read everything from an encoder's own ``preprocessor_config.json``.

        Raises:
            ValueError: if the file is missing or does not say what is needed.
        """
        file = Path(path) / "preprocessor_config.json"
        config = read_json(file)
        size, crop = config.get("size"), config.get("crop_size")
        if not config.get("do_center_crop", crop is not None):
            crop = None
        try:
            resized = _side(size)
            stretched = isinstance(size, dict) and "height" in size
            return cls(
                resized if crop is None else _side(crop),
                config["image_mean"],
                config["image_std"],
                shorter_side=0 if stretched else resized,
                resample=_RESAMPLE[config.get("resample", 3)],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} does not say image size, image_mean and image_std.") from error
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into pixels ``[3, size, size]``."""
        side = [self.shorter_side] if self.shorter_side else [self.size, self.size]
        image = functional.resize(image, side, interpolation=self.resample, antialias=True)
        top, left = (image.height - self.size) // 2, (image.width - self.size) // 2
        image = functional.crop(image, top, left, self.size, self.size)
        pixels = functional.to_dtype(functional.to_image(image), torch.float32, scale=True)
        return functional.normalize(pixels, self.mean, self.std).as_subclass(Tensor)


def _side(size: Any) -> int:
    """The side of a square, from the ways in which preprocessor files say it."""
    if isinstance(size, dict):
        size = size["shortest_edge"] if "shortest_edge" in size else size["height"]
    if not isinstance(size, int):
        raise TypeError(f"no size: {size!r}")
    return size
