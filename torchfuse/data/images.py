"""Image files as an encoder's pixels: resized, cropped and normalised as in its training.

The arithmetic is that of transformers' PIL backend. Its torchvision backend takes the same steps but
resizes tensors: it differs by a level or two of 255, and by more where bicubic overshoots or nearest
meets a tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from torchfuse.errors import CheckpointError, ConfigError, DataError
from torchfuse.io.strict_json import read_json

__all__ = ["ImageTransform", "open_image"]

# By PIL's numbers, which preprocessor files hold.
_RESAMPLE: Final = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The steps of a preprocessor file, with the keys that each needs and what those must be.
_STEPS: Final[dict[str, dict[str, str]]] = {
    "do_convert_rgb": {},
    "do_resize": {"size": "N, {shortest_edge: N} or {height: N, width: N}", "resample": "0, 2 or 3"},
    "do_center_crop": {"crop_size": "N or {height: N, width: N}"},
    "do_rescale": {"rescale_factor": "a number above 0"},
    "do_normalize": {"image_mean": "three numbers", "image_std": "three numbers above 0"},
}
# Defaults of keys that a file lacks: of all processors, and of each that has these steps and no others.
_DEFAULTS: Final = {"do_center_crop": False, "resample": 3, "rescale_factor": 1 / 255}
_PROCESSORS: Final[dict[str, dict[str, Any]]] = {
    "CLIP": {"do_center_crop": True},
    "Bit": {"do_center_crop": True},
    "Siglip": {},
    "Blip": {"default_to_square": True},
    "DeiT": {"default_to_square": True, "do_center_crop": True},
    "ViT": {"default_to_square": True, "resample": 2},
}


def open_image(path: str | Path) -> Image.Image:
    """Open an image as RGB: 16 bits are scaled to 8, and transparency is put on white.

    Raises:
        DataError: if the file is missing, damaged or no image, or if its values have no known range
            (mode ``F``, or ``I`` beyond 16 bits).
    """
    try:
        with Image.open(path) as image:
            return _as_rgb(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no image that can be opened.") from error
    except Exception as error:  # PIL's readers raise many kinds on damaged files
        reason = getattr(error, "strerror", None) or str(error).rstrip(".") or repr(error)
        raise DataError(f"The image {path} cannot be opened: {reason}.") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.getbands() in {("I",), ("F",)}:  # more than 8 bits, which PIL would clip to 255
        levels = np.asarray(image)
        if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
            raise DataError(f"its mode {image.mode} has no known range, save it with 8 or 16 bits")
        image = Image.fromarray(((levels.astype(np.int32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class ImageTransform:
    """Resize, crop and normalise images as an encoder's own preprocessor does.

    Args:
        size: side of the encoder's square input, in pixels. It is cropped from the center; an image
            that is smaller gets a black border.
        mean: mean of each channel, of scaled values.
        std: standard deviation of each channel.
        resize: the size before cropping: ``[shorter side]``, ``[height, width]``, or ``[]`` for none;
            ``[size]`` unless given.
        resample: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.
        scale: factor of the values 0 to 255, before they are normalised.

    Raises:
        ConfigError: if a number or a name is out of range.

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
        resize: Sequence[int] | None = None,
        resample: str = "bicubic",
        scale: float = 1 / 255,
    ) -> None:
        resize = [size] if resize is None else list(resize)
        if min(size, scale, *std, *resize) <= 0 or len(mean) != 3 or len(std) != 3 or len(resize) > 2:
            raise ConfigError(
                "An image transform needs three means and standard deviations, at most two sides in "
                "resize, and all but the means above 0, got "
                f"{size=}, {mean=}, {std=}, {resize=}, {scale=}."
            )
        if resample not in (names := _RESAMPLE.values()):
            raise ConfigError(f"resample must be one of {', '.join(names)}, got {resample!r}.")
        self.size, self.resize, self.scale = size, resize, scale
        self.mean, self.std = list(mean), list(std)
        self.resample = v2.InterpolationMode[resample.upper()]

    @classmethod
    def from_directory(cls, path: str | Path) -> ImageTransform:
        """Read the transform from an encoder's own ``preprocessor_config.json``.

        Keys that the file lacks have the defaults of the processor that it names, or of CLIP's.

        Raises:
            CheckpointError: if the file is missing, or naming each key whose value is not supported.
        """
        file = Path(path) / "preprocessor_config.json"
        given = {key: value for key, value in read_json(file).items() if value is not None}
        name = given.get("image_processor_type", given.get("feature_extractor_type", "CLIP"))
        kind = re.sub("(ImageProcessor|FeatureExtractor).*", "", str(name))
        config = dict.fromkeys(_STEPS, True) | _DEFAULTS | _PROCESSORS.get(kind, {}) | given
        readers: dict[str, Callable[[Any], Any]] = {
            "size": lambda value: _sides(value, square=bool(config.get("default_to_square"))),
            "crop_size": lambda value: _sides(value, square=True),
            "resample": _RESAMPLE.__getitem__,
            "rescale_factor": lambda value: _numbers([value], 1, above=0.0)[0],
            "image_mean": lambda value: _numbers(value, 3),
            "image_std": lambda value: _numbers(value, 3, above=0.0),
        }
        others = [key for key in given if key[:3] == "do_" and key not in _STEPS and given[key]]
        problems = [f"{key} is not supported" for key in others]
        if kind not in _PROCESSORS:
            problems.append(
                f"image_processor_type must be one of {', '.join(_PROCESSORS)}, got {name!r}"
            )
        values: dict[str, Any] = {}
        for step, keys in _STEPS.items():
            for key in keys if config[step] else ():
                try:
                    values[key] = readers[key](config[key])
                except (KeyError, TypeError, ValueError):
                    values[key] = None
                    problems.append(f"{key} must be {keys[key]} for {step}, got {config.get(key)!r}")
        square = values.get("crop_size", values.get("size", []))
        if square is not None and (len(square) != 2 or square[0] != square[1]):
            cut = {key: config.get(key) for key in ("do_resize", "size", "do_center_crop", "crop_size")}
            problems.append(f"only squares of one size are supported, and these give others: {cut}")
        if problems:
            raise CheckpointError(f"{file}: {'; '.join(problems)}.")
        return cls(
            square[0],
            values.get("image_mean", [0.0] * 3),
            values.get("image_std", [1.0] * 3),
            resize=values.get("size", []),
            resample=values.get("resample", "bicubic"),
            scale=values.get("rescale_factor", 1.0),
        )

    def check(
        self, image_size: int | None = None, *, preprocessor: str | Path | None = None, what: str = ""
    ) -> None:
        """Compare with the images that an encoder was trained on.

        Args:
            image_size: side of its images (``encoder.image_size``); None: not compared.
            preprocessor: its directory. If there is a ``preprocessor_config.json``, its ``image_mean``,
                ``image_std`` and ``rescale_factor`` are compared.
            what: the encoder's name, for the message.

        Raises:
            ConfigError: naming each number that differs.
            CheckpointError: if the file of the preprocessor is not JSON.
        """
        compared: dict[str, tuple[Any, Any]] = {}
        if image_size is not None:
            compared["size"] = (self.size, image_size)
        file = None if preprocessor is None else Path(preprocessor) / "preprocessor_config.json"
        if file is not None and file.is_file():
            config = read_json(file)
            for name, key, step, without in (
                ("mean", "image_mean", "do_normalize", [0.0] * 3),
                ("std", "image_std", "do_normalize", [1.0] * 3),
                ("scale", "rescale_factor", "do_rescale", 1.0),
            ):
                expected = config.get(key) if config.get(step, True) else without
                if expected is not None:
                    compared[name] = (getattr(self, name), expected)
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

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into pixels ``[3, size, size]``."""
        if self.resize:
            image = functional.resize(image, self.resize, interpolation=self.resample, antialias=True)
        top, left = (image.height - self.size) // 2, (image.width - self.size) // 2
        image = functional.crop(image, top, left, self.size, self.size)
        pixels = functional.pil_to_tensor(image).to(torch.float32) * self.scale
        return functional.normalize(pixels, self.mean, self.std)


def _sides(value: Any, *, square: bool) -> list[int]:
    """Return ``[shorter side]`` or ``[height, width]`` from any spelling of preprocessor files."""
    if isinstance(value, int):
        value = dict.fromkeys(("height", "width") if square else ("shortest_edge",), value)
    sides = {key: side for key, side in sorted(dict(value).items()) if side is not None}
    named = list(sides) in (["shortest_edge"], ["height", "width"])
    if not named or any(type(side) is not int or side < 1 for side in sides.values()):
        raise CheckpointError(f"no size: {value}")
    return list(sides.values())


def _numbers(value: Any, count: int, above: float = -math.inf) -> list[float]:
    numbers = [1.0 * number for number in value]
    if len(numbers) != count or not all(above < number < math.inf for number in numbers):
        raise CheckpointError(f"not {count} numbers above {above}: {value}")
    return numbers


def _same(own: Any, expected: Any) -> bool:
    try:
        return np.allclose(expected, own, rtol=1e-5, atol=0) and np.shape(expected) == np.shape(own)
    except (TypeError, ValueError):  # the file's value can be anything
        return False
