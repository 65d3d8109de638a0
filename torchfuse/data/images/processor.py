"""The file of a transformers image processor, and its settings.

transformers 5 writes ``processor_config.json``, with the settings under ``image_processor``; earlier
versions, and image processors that are saved alone, write ``preprocessor_config.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from PIL import Image

from torchfuse.errors import CheckpointError
from torchfuse.io.strict_json import read_json

__all__ = ["RESAMPLE", "ProcessorConfig", "find_processor", "is_count", "read_processor"]

# Names of filters by PIL's numbers, which the files hold.
RESAMPLE: Final = {int(filter): filter.name.lower() for filter in sorted(Image.Resampling)}
_NESTED: Final = "processor_config.json"
_PLAIN: Final = "preprocessor_config.json"

# Defaults of keys that a file lacks: of all processors, and of each that is supported.
_DEFAULTS: Final = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "default_to_square": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_SHORTEST_EDGE: Final = {"default_to_square": False}
_CLIP: Final = {"default_to_square": False, "do_center_crop": True}
_PROCESSORS: Final[dict[str, dict[str, Any]]] = {
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _SHORTEST_EDGE,
    "Blip": {},
    "DeiT": {"do_center_crop": True, "do_convert_rgb": False},
    "ViT": {"resample": 2, "do_convert_rgb": False},
    "ConvNext": _SHORTEST_EDGE | {"crop_pct": 224 / 256, "do_convert_rgb": False},
    "Llava": _CLIP,
    "LlavaNext": _CLIP | {"crop_size": 224},
    "Mllama": {"resample": 2, "do_pad": True, "max_image_tiles": 4},
}


def find_processor(path: str | Path) -> Path | None:
    """Return the file with the settings of a directory's image processor; None if it has none.

    Raises:
        CheckpointError: if a file is not JSON.
    """
    nested, plain = Path(path) / _NESTED, Path(path) / _PLAIN
    if nested.is_file() and isinstance(read_json(nested).get("image_processor"), dict):
        return nested
    # A feature extractor of audio has a file of this name too.
    return plain if plain.is_file() and "sampling_rate" not in read_json(plain) else None


def read_processor(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Read the settings of a directory's image processor, without those that are null.

    Returns:
        The file, and its settings by key.

    Raises:
        CheckpointError: if neither file holds any, or one is not JSON.
    """
    file = find_processor(path)
    if file is None:
        raise CheckpointError(
            f"{path} holds no image processor: expected {_PLAIN}, or {_NESTED} with image_processor."
        )
    content = read_json(file)
    settings = content["image_processor"] if file.name == _NESTED else content
    return file, {key: value for key, value in settings.items() if value is not None}


class ProcessorConfig:
    """The settings of an image processor, checked as they are read.

    Args:
        path: the directory.

    Attributes:
        kind: the processor's name without its ending, ``"CLIP"`` where the file has none.

    Raises:
        CheckpointError: if there are no settings.
    """

    def __init__(self, path: str | Path) -> None:
        self.file, self._given = read_processor(path)
        given = self._given
        name = given.get("image_processor_type", given.get("feature_extractor_type", "CLIP"))
        self.kind = re.sub("(ImageProcessor|FeatureExtractor).*", "", str(name))
        self._values = _DEFAULTS | _PROCESSORS.get(self.kind, {}) | given
        self._problems: list[str] = []
        if self.kind not in _PROCESSORS:
            self.add_problem(
                f"image_processor_type must be one of {', '.join(_PROCESSORS)}, got {name!r}"
            )

    def add_problem(self, problem: str) -> None:
        """Add to what ``check`` raises."""
        self._problems.append(problem)

    def check(self, *steps: str) -> None:
        """Check that all was read, and that there are no other steps.

        Args:
            steps: steps beside those that all transforms have.

        Raises:
            CheckpointError: naming the file, and each key whose value is not supported.
        """
        supported = {*_DEFAULTS, *steps}
        others = [key for key in self._given if key[:3] == "do_" and key not in supported]
        problems = [f"{key} is not supported" for key in others if self._given[key]] + self._problems
        if problems:
            raise CheckpointError(f"{self.file}: {'; '.join(problems)}.")

    def has(self, step: str) -> bool:
        """Whether the processor takes a step, such as ``do_resize``."""
        return bool(self._values.get(step))

    def values(self, *keys: str) -> dict[str, Any]:
        """Return keys and their values as the file has them, for messages."""
        return {key: self._values.get(key) for key in keys}

    def read(self, key: str, expected: str, reader: Callable[[Any], Any]) -> Any:
        """Return what a reader makes of a key's value; None, and a problem, where it raises.

        Args:
            key: the key.
            expected: what the value must be, for the message.
            reader: raises a KeyError, TypeError or ValueError for other values.
        """
        try:
            return reader(self._values[key])
        except (KeyError, TypeError, ValueError):
            self.add_problem(f"{key} must be {expected}, got {self._values.get(key)!r}")
            return None

    def sides(self) -> Any:
        """Return ``size`` as ``[shorter side]`` or ``[height, width]``."""
        return self.read(
            "size",
            "N, {shortest_edge: N} or {height: N, width: N} for do_resize",
            lambda value: _sides(value, square=self.has("default_to_square")),
        )

    def crop(self) -> Any:
        """Return ``crop_size`` as ``[height, width]``."""
        expected = "N or {height: N, width: N} for do_center_crop"
        return self.read("crop_size", expected, lambda value: _pair(_sides(value, square=True)))

    def convnext_sizes(self, resize: list[int] | None) -> tuple[Any, Any]:
        """Return the size before cropping and after: small images are cropped, others are stretched."""
        if self.has("do_center_crop"):
            self.add_problem("do_center_crop is not supported with ConvNext's own crop")
        if resize is None or len(resize) == 2:
            if resize is not None:
                self.add_problem(f"size must be {{shortest_edge: N}}, got {self._values['size']!r}")
            return resize, resize
        side = resize[0]
        if side >= 384:
            return [side, side], [side, side]
        share = self.read("crop_pct", "a number in (0, 1]", _share)
        return None if share is None else [int(side / share)], [side, side]

    def arithmetic(self) -> dict[str, Any]:
        """Return the arguments of all transforms that do not depend on sizes."""
        options: dict[str, Any] = {"convert_rgb": self.has("do_convert_rgb")}
        if self.has("do_resize"):
            options["resample"] = self.read(
                "resample", f"one of {', '.join(map(str, RESAMPLE))} for do_resize", RESAMPLE.__getitem__
            )
        options["scale"], options["mean"], options["std"] = 1.0, [0.0] * 3, [1.0] * 3
        if self.has("do_rescale"):
            options["scale"] = self.read(
                "rescale_factor",
                "a number above 0 for do_rescale",
                lambda value: _numbers([value], 1, above=0.0)[0],
            )
        if self.has("do_normalize"):
            options["mean"] = self.read(
                "image_mean", "three numbers for do_normalize", lambda value: _numbers(value, 3)
            )
            options["std"] = self.read(
                "image_std",
                "three numbers above 0 for do_normalize",
                lambda value: _numbers(value, 3, above=0.0),
            )
        return options


def _sides(value: Any, *, square: bool) -> list[int]:
    """Return ``[shorter side]`` or ``[height, width]`` from any spelling of processor files."""
    if isinstance(value, int):
        value = dict.fromkeys(("height", "width") if square else ("shortest_edge",), value)
    sides = {key: side for key, side in sorted(dict(value).items()) if side is not None}
    named = list(sides) in (["shortest_edge"], ["height", "width"])
    if not named or not all(is_count(side) for side in sides.values()):
        raise ValueError
    return list(sides.values())


def _pair(sides: list[int]) -> list[int]:
    if len(sides) != 2:
        raise ValueError
    return sides


def is_count(value: Any) -> bool:
    """Whether a value is an integer above 0."""
    return type(value) is int and value > 0


def _share(value: Any) -> float:
    if not 0 < value <= 1:
        raise ValueError
    return float(value)


def _numbers(value: Any, count: int, above: float = -math.inf) -> list[float]:
    numbers = [1.0 * number for number in value]
    if len(numbers) != count or not all(above < number < math.inf for number in numbers):
        raise ValueError
    return numbers
