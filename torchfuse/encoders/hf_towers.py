"""Facts about transformers' towers that their configurations do not state, by ``model_type``.

These are the number of special tokens in front of the patches, the shape of the inputs, and how a mask
of the input applies to the features. For a tower that is in no table here the caller gives what is
missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from torchfuse.errors import ModelError

__all__ = [
    "ANY_SIZE",
    "AXES",
    "count_special_tokens",
    "example_input",
    "features_mask",
    "input_axes",
    "num_tokens",
    "pair",
    "special_tokens",
]

# The special tokens in front of the others.
_SPECIAL: Final[dict[str, tuple[str, ...]]] = {
    "clip_vision_model": ("class",),
    "vit": ("class",),
    "deit": ("class", "distillation"),
    "dinov2": ("class",),
    "dinov2_with_registers": ("class", "register"),
    "dinov3_vit": ("class", "register"),
    "siglip_vision_model": (),
    "siglip2_vision_model": (),
    "audio-spectrogram-transformer": ("class", "distillation"),
    "whisper": (),
    "wav2vec2": (),
    "hubert": (),
}
_NAFLEX: Final = "siglip2_vision_model"
_AST: Final = "audio-spectrogram-transformer"
# Axes of a batch of the main input, by its name, and by model where they differ.
AXES: Final = {"pixel_values": 4, "input_features": 3, "input_values": 2}
_OTHER_AXES: Final = {_NAFLEX: 3, _AST: 3}
# Towers that take images of any size, whose number of features depends on it.
ANY_SIZE: Final = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})


def special_tokens(model_type: str) -> tuple[str, ...] | None:
    """Return the kinds of special tokens in front of a tower's patches; None where not known."""
    return _SPECIAL.get(model_type)


def count_special_tokens(config: Any, keep_cls: bool | None, given: int | None) -> tuple[int, list[str]]:
    """Return the number of special tokens, and what is wrong with ``keep_cls`` and a given number."""
    names = _SPECIAL.get(config.model_type)
    if names is None and given is None:
        return 0, ["its number of special tokens in front is not known here: give num_special_tokens="]
    counts = {name: config.num_register_tokens if name == "register" else 1 for name in names or ()}
    known = sum(counts.values())
    if given is not None and (given < 0 or (names is not None and given != known)):
        right = "it must be at least 0" if names is None else f"it has {known}"
        return known, [f"num_special_tokens={given}, but {right}"]
    number = known if given is None else given
    if number and keep_cls is None:
        what = " and ".join(f"{count} {name}" for name, count in counts.items()) or str(number)
        return number, [f"it has {what} token in front: give keep_cls=True or keep_cls=False"]
    if not number and keep_cls is not None:
        return number, [f"keep_cls={keep_cls}, but it has no class token: leave keep_cls out"]
    return number, []


def input_axes(model_type: str, main_input: str) -> int:
    """Return the number of axes of a batch of a tower's main input."""
    return _OTHER_AXES.get(model_type, AXES[main_input])


def num_tokens(config: Any, sides: tuple[int, int] | None, kept: int) -> int | None:
    """Return the features of one image or clip; None where they depend on the input or are not known.

    Args:
        config: the tower's configuration.
        sides: height and width of the images, if they are fixed.
        kept: special tokens among the features.
    """
    if config.model_type == "whisper":
        return int(config.max_source_positions)
    if config.model_type == _AST:
        mels = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        return int(mels * ((config.max_length - config.patch_size) // config.time_stride + 1)) + kept
    patch = pair(getattr(config, "patch_size", None))
    if config.model_type not in _SPECIAL or not sides or not patch:
        return None
    return (sides[0] // patch[0]) * (sides[1] // patch[1]) + kept


def example_input(config: Any, main_input: str, sides: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return the smallest input that a tower runs on: a black image, one black patch, or silence.

    Raises:
        ModelError: if it is not known for this tower.
    """
    if config.model_type == _NAFLEX:
        return {
            "pixel_values": torch.zeros(1, 1, config.num_channels * config.patch_size**2),
            "pixel_attention_mask": torch.ones(1, 1, dtype=torch.long),
            "spatial_shapes": torch.ones(1, 2, dtype=torch.long),
        }
    if sides:
        shape = [getattr(config, "num_channels", 3), *sides]
    elif config.model_type == "whisper":
        shape = [config.num_mel_bins, 2 * config.max_source_positions]
    elif config.model_type == _AST:
        shape = [config.max_length, config.num_mel_bins]
    elif hasattr(config, "conv_stride"):
        length = getattr(config, "mask_time_length", 1)  # shorter clips cannot be masked in training
        for kernel, stride in reversed([*zip(config.conv_kernel, config.conv_stride, strict=True)]):
            length = (length - 1) * stride + kernel
        shape = [length]
    else:
        raise ModelError(
            f"The smallest input of {config.model_type!r} is not known: pass example_input=."
        )
    return {main_input: torch.zeros(1, *shape)}


def features_mask(config: Any, keywords: Mapping[str, Any]) -> Tensor | None:
    """Return which features are valid ``[b, n]``, True: may be attended to; None without a mask.

    Args:
        config: the tower's configuration.
        keywords: the tower's, one image or clip a row.

    Raises:
        ModelError: if it is not known how this tower's mask applies to its features.
    """
    naflex = config.model_type == _NAFLEX
    mask = keywords.get("pixel_attention_mask" if naflex else "attention_mask")
    if mask is None or naflex:
        return mask if mask is None else mask.bool()
    if config.model_type == "whisper":
        return mask[:, ::2].bool()
    if not hasattr(config, "conv_stride"):
        raise ModelError(f"How a mask applies to the features of {config.model_type!r} is not known.")
    lengths, total = mask.long().sum(-1), mask.shape[-1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        lengths, total = (lengths - kernel) // stride + 1, (total - kernel) // stride + 1
    return torch.arange(total, device=mask.device) < lengths[:, None]


def pair(value: Any) -> tuple[int, int] | None:
    """Return height and width from one number or two; None for anything else."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None
