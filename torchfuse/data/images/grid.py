"""The grids of LLaVA-NeXT ("any resolution"): the whole image, and tiles of it at a higher resolution.

Of the resolutions that the processor lists, the one that keeps most of the image and wastes least is
taken. The image is resized to fit, keeping its ratio, and black fills the rest on both sides. As
transformers' ``LlavaNextImageProcessor``, to the bit.

A tower without a merging of its own encodes whole image and tiles as so many images. LLaVA-NeXT's
merging puts the features of the tiles on one map, cuts off those of the black border, and ends each row
of the map with one more feature; ``num_merged_features`` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchfuse.data.images.processor import ProcessorConfig, is_count
from torchfuse.data.images.tiles import cut
from torchfuse.data.images.transform import CLIP_MEAN, CLIP_STD, ImageTransform
from torchfuse.data.media import MediaInput
from torchfuse.errors import ConfigError

__all__ = ["GridImageTransform"]


class GridImageTransform(ImageTransform, processor="LlavaNext"):
    """Turn images into a small version of the whole, and tiles in rows, normalised.

    Args:
        size: side of the whole image and of a tile, in pixels.
        mean: mean of each channel, of scaled values.
        std: standard deviation of each channel.
        resolutions: (height, width) of the grids in pixels, multiples of ``size``.
        resample: see ``ImageTransform``, as all others.
        scale: factor of the values 0 to 255.
        convert_rgb: whether images of other modes are converted.
        max_pixels: images with more pixels are made smaller first, so that they have fewer tiles.

    Raises:
        ConfigError: if a number or a name is out of range.

    Examples:
        >>> transform = GridImageTransform(8, resolutions=[(8, 16), (16, 8), (16, 16)])
        >>> transform(Image.new("RGB", (40, 10))).shape  # the whole image, and two tiles
        torch.Size([3, 3, 8, 8])
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        resolutions: Sequence[Sequence[int]],
        resample: str = "bicubic",
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
        wrong = [
            sides
            for sides in resolutions
            if len(sides) != 2 or any(s < 1 or s % self.height for s in sides)
        ]
        if self.height != self.width or wrong or not resolutions:
            raise ConfigError(
                "A grid needs square tiles, and resolutions (height, width) that are multiples of their "
                f"side, got {size=}, {resolutions=}."
            )
        self.resolutions = [(height, width) for height, width in resolutions]

    @staticmethod
    def _options(config: ProcessorConfig) -> dict[str, Any]:
        size, crop = config.sides(), config.crop()
        sides = {*(size or []), *(crop or [])}
        if size is not None and crop is not None and len(sides) != 1:
            given = config.values("size", "crop_size")
            config.add_problem(f"size and crop_size must be one square, got {given}")
        resolutions = config.read(
            "image_grid_pinpoints",
            f"resolutions [height, width], multiples of {size and size[0]}",
            lambda value: _resolutions(value, size[0] if size else 1),
        )
        config.check("do_pad")
        return {"size": size[0], "resolutions": resolutions}

    def resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the grid of an image, in pixels.

        Args:
            size: height and width of the image.
        """
        height, width = self._limited(size)

        def rank(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[0] / height, grid[1] / width)
            kept = min(int(width * scale) * int(height * scale), height * width)
            return kept, kept - grid[0] * grid[1]

        return max(self.resolutions, key=rank)

    @property
    def max_items(self) -> int:
        return 1 + max(map(self._num_tiles, self.resolutions))

    def num_items(self, size: tuple[int, int]) -> int:
        return 1 + self._num_tiles(self.resolution(size))

    def _num_tiles(self, resolution: tuple[int, int]) -> int:
        return math.prod(side // self.height for side in resolution)

    def num_merged_features(self, size: tuple[int, int], features_per_side: int) -> int:
        """Return how many features LLaVA-NeXT's merging makes of an image.

        Args:
            size: height and width of the image.
            features_per_side: features of a tile in a row; it has as many rows.
        """
        height, width = self._limited(size)
        rows, columns = (features_per_side * side // self.height for side in self.resolution(size))
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        return features_per_side**2 + rows * columns + rows

    def media_input(self, image: Image.Image) -> MediaInput:
        return MediaInput(self(image), size=self._limited((image.height, image.width)))

    def __call__(self, image: Image.Image) -> Tensor:
        image = self._prepare(image)
        height, width = self.resolution((image.height, image.width))
        whole = self._pixels(self._resize(image, (self.height, self.width)))
        scale_h, scale_w = height / image.height, width / image.width
        if scale_w < scale_h:
            fit = (min(math.ceil(image.height * scale_w), height), width)
        else:
            fit = (height, min(math.ceil(image.width * scale_h), width))
        canvas = Image.new("RGB", (width, height))
        canvas.paste(self._resize(image, fit), ((width - fit[1]) // 2, (height - fit[0]) // 2))
        return torch.cat([whole[None], cut(self._pixels(canvas), self.height)])


def _resolutions(value: Any, side: int) -> list[list[int]]:
    grids = [list(grid) for grid in value]
    if not grids or any(len(g) != 2 or not all(is_count(s) and s % side == 0 for s in g) for g in grids):
        raise ValueError
    return grids
