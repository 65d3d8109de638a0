"""Image files as the encoder wants them: its size, its mean and its deviation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from torchfuse.checkpoint.directory import read_json

__all__ = ["ImageTransform", "open_image"]

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
    """Resize the shorter side, cut out the middle, normalise.

    Args:
        size: side of the square that the encoder takes, in pixels.
        mean: mean of each channel, of values in [0, 1].
        std: deviation of each channel.

    Example:
        >>> ImageTransform(8)(Image.new("RGB", (20, 10))).shape
        torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = _CLIP_MEAN,
        std: Sequence[float] = _CLIP_STD,
    ) -> None:
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                "An image transform needs a positive size and three means and positive deviations, got "
                f"size={size}, mean={list(mean)}, std={list(std)}."
            )
        self.size = size
        self._transform = v2.Compose(
            [
                v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageTransform:
        """Read size, mean and deviation from an encoder's own ``preprocessor_config.json``.

        Raises:
            ValueError: if the file is missing or does not say what is needed.
        """
        file = Path(path) / "preprocessor_config.json"
        config = read_json(file)
        size = config.get("crop_size") or config.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        try:
            assert isinstance(size, int)
            return cls(size, config["image_mean"], config["image_std"])
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not say image size, image_mean and image_std.") from error

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into pixels ``[3, size, size]``."""
        return self._transform(image)
