"""Images as an encoder's pixels: resized, cropped and normalised as in its training.

The arithmetic is that of transformers' PIL backend, to the bit. Its torchvision backend takes the same
steps but resizes tensors: it differs by a level or two of 255, and by more where bicubic overshoots or
nearest meets a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchfuse.data.images.opening import to_rgb
from torchfuse.data.images.processor import RESAMPLE, ProcessorConfig, read_processor
from torchfuse.data.media import MediaInput
from torchfuse.errors import CheckpointError, ConfigError, DataError

__all__ = ["CLIP_MEAN", "CLIP_STD", "ImageTransform"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageTransform:
    """Resize, crop and normalise images as an encoder's own preprocessor does.

    Args:
        size: height and width of the encoder's input in pixels, or the side of a square. It is cropped
            from the center; an image that is smaller gets a black border.
        mean: mean of each channel, of scaled values.
        std: standard deviation of each channel.
        resize: the size before cropping: ``[shorter side]``, ``[height, width]``, or ``[]`` for none.
            None: the shorter side of a square becomes ``size``; other images are resized to ``size``.
        resample: name of a filter of PIL, such as ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.
        scale: factor of the values 0 to 255, before they are normalised.
        pad_to_square: whether the shorter side is padded with the color ``mean`` first.
        convert_rgb: whether images of other modes are converted to RGB, instead of refused.
        max_pixels: images with more pixels are made smaller first. None: no limit.

    Raises:
        ConfigError: if a number or a name is out of range.

    Examples:
        >>> ImageTransform(8)(Image.new("RGB", (20, 10))).shape
        torch.Size([3, 8, 8])
    """

    _by_processor: ClassVar[dict[str, type[ImageTransform]]] = {}

    def __init_subclass__(cls, *, processor: str) -> None:
        """Register a subclass as the transform of a processor, by its name without the ending."""
        super().__init_subclass__()
        cls._by_processor[processor] = cls

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        resize: Sequence[int] | None = None,
        resample: str = "bicubic",
        scale: float = 1 / 255,
        pad_to_square: bool = False,
        convert_rgb: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        sides = [size, size] if isinstance(size, int) else list(size)
        square = len(set(sides)) == 1
        resize = (sides[:1] if square else sides) if resize is None else list(resize)
        positive = [*sides, scale, *std, *resize, 1 if max_pixels is None else max_pixels]
        shapes = (len(sides), len(mean), len(std)) == (2, 3, 3) and len(resize) <= 2
        if not shapes or min(positive) <= 0:
            raise ConfigError(
                "An image transform needs three means and standard deviations, at most two sides in "
                "size and resize, and all but the means above 0, got "
                f"{size=}, {mean=}, {std=}, {resize=}, {scale=}, {max_pixels=}."
            )
        if resample not in (names := RESAMPLE.values()):
            raise ConfigError(f"resample must be one of {', '.join(names)}, got {resample!r}.")
        self.height, self.width = sides
        self.resize, self.resample, self.scale = resize, resample, scale
        self.mean, self.std = list(mean), list(std)
        self.pad_to_square, self.convert_rgb, self.max_pixels = pad_to_square, convert_rgb, max_pixels
        levels = (np.arange(256) * float(scale)).astype(np.float32)[:, None]
        self._values = (
            (levels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        ).T  # of each level, [3, 256]

    @classmethod
    def from_directory(cls, path: str | Path, *, max_pixels: int | None = None) -> Self:
        """Read the transform from the directory of a transformers processor.

        The settings are those in ``preprocessor_config.json``, or under ``image_processor`` in
        ``processor_config.json``. Keys that the file lacks have the defaults of the processor that it
        names, or of CLIP's. Mllama's are read as a ``TiledImageTransform``, LLaVA-NeXT's as a
        ``GridImageTransform``.

        Args:
            path: the directory.
            max_pixels: images with more pixels are made smaller first. None: no limit.

        Raises:
            CheckpointError: if there are no settings, or naming each key whose value is not supported;
                if the processor's images need another class than this one.
        """
        config = ProcessorConfig(path)
        kind = cls._by_processor.get(config.kind, ImageTransform)
        if not issubclass(kind, cls):
            raise CheckpointError(
                f"{config.file}: {config.kind}ImageProcessor is read by {kind.__name__}, not by "
                f"{cls.__name__}."
            )
        options = config.arithmetic() | kind._options(config)
        return kind(**options, max_pixels=max_pixels)

    @staticmethod
    def _options(config: ProcessorConfig) -> dict[str, Any]:
        """Return the arguments that ``arithmetic`` leaves out, after a check of the whole file."""
        resize = config.sides() if config.has("do_resize") else []
        size = config.crop() if config.has("do_center_crop") else resize
        if config.kind == "ConvNext" and config.has("do_resize"):
            resize, size = config.convnext_sizes(resize)
        if size is not None and len(size) != 2:
            cut = config.values("do_resize", "size", "do_center_crop", "crop_size")
            config.add_problem(f"only images of one size are supported, and these give others: {cut}")
        llava = config.kind == "Llava"
        config.check(*["do_pad"] if llava else [])
        return {"size": size, "resize": resize, "pad_to_square": llava and config.has("do_pad")}

    @property
    def size(self) -> int | tuple[int, int]:
        """The side of the square that the encoder takes, or height and width."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def max_items(self) -> int:
        """The most images that an image becomes, see ``num_items``."""
        return 1

    def check(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        max_tiles: int | None = None,
        preprocessor: str | Path | None = None,
        what: str = "",
    ) -> None:
        """Compare with the images that an encoder was trained on.

        Args:
            image_size: side of its images (``encoder.image_size``), or height and width; None: not
                compared.
            max_tiles: the tiles that it pads an image to; None for an encoder of whole images. Compared
                by a transform that makes tiles: an encoder of tiles takes whole images as one.
            preprocessor: directory of its processor, whose ``image_mean``, ``image_std`` and
                ``rescale_factor`` are compared.
            what: the encoder's name, for the message.

        Raises:
            ConfigError: naming each number that differs.
            CheckpointError: if the directory holds nothing to compare with.
        """
        compared: dict[str, tuple[Any, Any]] = {}
        if image_size is not None:
            sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
            expected = sides[0] if len(set(sides)) == 1 else sides
            compared["size"] = (self.size, expected)
        compared |= self._tiles_beside(max_tiles)
        if preprocessor is not None:
            compared |= self._numbers_of(preprocessor)
        problems = [
            f"{name} is {own}, the encoder's {expected}"
            for name, (own, expected) in compared.items()
            if not _same(own, expected)
        ]
        if problems:
            raise ConfigError(
                f"Images differ from those that the encoder{what and f' {what!r}'} was trained on: "
                f"{'; '.join(problems)}. ImageTransform.from_directory reads these numbers from the "
                "encoder's own directory."
            )

    def _tiles_beside(self, max_tiles: int | None) -> dict[str, tuple[Any, Any]]:
        """Return the most tiles that an image becomes, beside the encoder's number."""
        return {}

    def _numbers_of(self, preprocessor: str | Path) -> dict[str, tuple[Any, Any]]:
        """Return each number of this transform beside that in a processor's directory."""
        file, config = read_processor(preprocessor)
        compared = {}
        for name, key, step, without in (
            ("mean", "image_mean", "do_normalize", [0.0] * 3),
            ("std", "image_std", "do_normalize", [1.0] * 3),
            ("scale", "rescale_factor", "do_rescale", 1.0),
        ):
            expected = config.get(key) if config.get(step, True) else without
            if expected is not None:
                compared[name] = (getattr(self, name), expected)
        if not compared:
            raise CheckpointError(f"{file} holds none of image_mean, image_std and rescale_factor.")
        return compared

    def num_items(self, size: tuple[int, int]) -> int:
        """Return the number of images that an image becomes: 1, or its tiles.

        Args:
            size: height and width of the image, as of ``image_size``.
        """
        return 1

    def media_input(self, image: Image.Image) -> MediaInput:
        """Turn an image into what its encoder takes: ``[1, 3, h, w]``, or tiles."""
        return MediaInput(self(image)[None], size=(image.height, image.width))

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an image into pixels ``[3, height, width]``, or ``[t, 3, height, width]`` for tiles.

        Raises:
            DataError: for an image that is not RGB, unless it is to be converted, and for one so narrow
                that it would become larger than those that PIL opens.
        """
        image = self._prepare(image)
        if self.pad_to_square:
            side, color = max(image.size), tuple(int(mean * 255) for mean in self.mean)
            _check_pixels(image, side, side)
            square = Image.new("RGB", (side, side), color)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.resize:
            image = self._resize(image, _resized(image, self.resize))
        top, left = (image.height - self.height) // 2, (image.width - self.width) // 2
        return self._pixels(image.crop((left, top, left + self.width, top + self.height)))

    def _prepare(self, image: Image.Image) -> Image.Image:
        """Return an image as RGB, with at most ``max_pixels``."""
        if image.mode != "RGB":
            if not self.convert_rgb:
                raise DataError(
                    f"The image has mode {image.mode}, and the encoder's processor takes RGB only, "
                    "without a conversion: open it by open_image."
                )
            image = to_rgb(image)
        height, width = self._limited((image.height, image.width))
        return image if image.size == (width, height) else self._resize(image, (height, width))

    def _limited(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width with at most ``max_pixels``, in the same ratio."""
        height, width = size
        if self.max_pixels is None or height * width <= self.max_pixels:
            return size
        factor = math.sqrt(self.max_pixels / (height * width))
        shorter = max(1, int(min(size) * factor))
        longer = max(1, min(int(max(size) * factor), self.max_pixels // shorter))
        return (shorter, longer) if height < width else (longer, shorter)

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        height, width = size
        _check_pixels(image, height, width)
        return image.resize((width, height), Image.Resampling[self.resample.upper()])

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return the scaled and normalised values of an RGB image, ``[3, h, w]``."""
        levels = np.asarray(image)
        return torch.from_numpy(np.stack([self._values[c][levels[..., c]] for c in range(3)]))


def _check_pixels(image: Image.Image, height: int, width: int) -> None:
    """Refuse to make an image larger than those that PIL opens, as of one that is long and narrow."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise DataError(
            f"An image of {image.width:,} x {image.height:,} pixels is too narrow: before it is cropped "
            f"it would become {width:,} x {height:,}. Crop it first."
        )


def _resized(image: Image.Image, resize: Sequence[int]) -> tuple[int, int]:
    """Return the height and width that an image is resized to."""
    if len(resize) == 2:
        return resize[0], resize[1]
    shorter = resize[0]
    longer = int(shorter * max(image.size) / min(image.size))
    return (longer, shorter) if image.width <= image.height else (shorter, longer)


def _same(own: Any, expected: Any) -> bool:
    try:
        return np.allclose(expected, own, rtol=1e-5, atol=0) and np.shape(expected) == np.shape(own)
    except (TypeError, ValueError):  # the file's value can be anything
        return False
