"""The tiles of Llama 3.2 Vision (Mllama): an image on a canvas of equal squares, up to a number of them.

The canvas is the smallest one that does not shrink the image, or the one that shrinks it least. The
image is resized to fit, keeping its ratio, and black fills the canvas on the right and below. As
transformers' ``MllamaImageProcessor``, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchfuse.data.images.processor import ProcessorConfig, is_count
from torchfuse.data.images.transform import CLIP_MEAN, CLIP_STD, ImageTransform
from torchfuse.data.media import MediaInput
from torchfuse.errors import ConfigError

__all__ = ["TiledImageTransform", "cut"]


class TiledImageTransform(ImageTransform, processor="Mllama"):
    """Cut images into tiles and normalise them, for ``MllamaVisionEncoder``.

    Args:
        size: side of a tile, in pixels.
        mean: mean of each channel, of scaled values.
        std: standard deviation of each channel.
        max_tiles: tiles that an image has at most, and that the encoder pads each image to.
        resample: see ``ImageTransform``, as all others.
        scale: factor of the values 0 to 255.
        convert_rgb: whether images of other modes are converted.
        max_pixels: images with more pixels are made smaller first, so that they have fewer tiles.

    Raises:
        ConfigError: if a number or a name is out of range.

    Examples:
        >>> transform = TiledImageTransform(8, max_tiles=4)
        >>> tiles = transform.media_input(Image.new("RGB", (20, 10)))
        >>> tiles.items.shape, tiles.extras["aspect_ratio"]  # one tile high, two wide
        (torch.Size([2, 3, 8, 8]), tensor([1, 2]))
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        max_tiles: int = 4,
        resample: str = "bilinear",
        scale: float = 1 / 255,
        convert_rgb: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(
            size,
            mean,
            std,
            resample=resample,
            scale=scale,
            convert_rgb=convert_rgb,
            max_pixels=max_pixels,
        )
        if self.height != self.width or max_tiles < 1:
            raise ConfigError(
                f"Tiles must be squares, at least one an image, got {size=}, {max_tiles=}."
            )
        self.max_tiles = max_tiles

    @staticmethod
    def _options(config: ProcessorConfig) -> dict[str, Any]:
        size = config.sides()
        if size is not None and (len(size) != 2 or size[0] != size[1]):
            config.add_problem(f"size must be a square, got {config.values('size')['size']!r}")
        for step in ("do_resize", "do_pad"):
            if not config.has(step):
                config.add_problem(f"tiles need {step}")
        max_tiles = config.read("max_image_tiles", "an integer above 0", _count)
        config.check("do_pad")
        return {"size": size[0], "max_tiles": max_tiles}

    def _tiles_beside(self, max_tiles: int | None) -> dict[str, tuple[Any, Any]]:
        return {"max_tiles": (self.max_tiles, max_tiles)}

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return how many tiles high and wide the canvas of an image is.

        Args:
            size: height and width of the image.
        """
        height, width = self._limited(size)
        scales = {
            (h, w): min(h * self.height / height, w * self.width / width)
            for h in range(1, self.max_tiles + 1)
            for w in range(1, self.max_tiles // h + 1)
        }
        larger = [scale for scale in scales.values() if scale >= 1]
        best = min(larger) if larger else max(scales.values())
        return min((t for t in scales if scales[t] == best), key=lambda t: t[0] * t[1])

    @property
    def max_items(self) -> int:
        return self.max_tiles

    def num_items(self, size: tuple[int, int]) -> int:
        return math.prod(self.tiles(size))

    def media_input(self, image: Image.Image) -> MediaInput:
        size = (image.height, image.width)
        return MediaInput(
            self(image),
            extras={"aspect_ratio": torch.tensor(self.tiles(size))},
            max_items=self.max_tiles,
            size=size,
        )

    def __call__(self, image: Image.Image) -> Tensor:
        h, w = self.tiles((image.height, image.width))
        image = self._prepare(image)
        image = self._resize(image, self._fit(image, h * self.height, w * self.width))
        canvas = Image.new("RGB", (w * self.width, h * self.height))
        canvas.paste(image)
        return cut(self._pixels(canvas), self.height)

    def _fit(self, image: Image.Image, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image on a canvas, where it is not made larger than a tile."""
        high = min(max(image.height, self.height), height)
        wide = min(max(image.width, self.width), width)
        scale_h, scale_w = high / image.height, wide / image.width
        if scale_w < scale_h:
            return min(math.floor(image.height * scale_w) or 1, high), wide
        return high, min(math.floor(image.width * scale_h) or 1, wide)


def cut(pixels: Tensor, side: int) -> Tensor:
    """Cut pixels ``[3, H, W]`` into squares ``[t, 3, side, side]``, row by row."""
    tiles = pixels.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [3, h, side, w, side]
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError
    return int(value)
