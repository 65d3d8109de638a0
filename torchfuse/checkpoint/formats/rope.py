"""Llama's rotary embedding, in configurations, modules and the layout of projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from torchfuse.checkpoint.formats.key_table import Layout
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.errors import CheckpointError

__all__ = ["rope_from_config", "rope_from_module", "rope_to_config", "rotary_layout"]

# Llama 3.1's scaling: the configuration's key, torchtune's name, and the value without scaling.
_SCALING: Final = {
    "factor": ("scale_factor", 1.0),
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "original_max_position_embeddings": ("old_context_len", 8192.0),
}


def rotary_layout(head_dim: int) -> Layout:
    """Return the layout of query and key projections ``[heads * head_dim, d]``.

    torchtune, like Meta's code, rotates neighbouring pairs of each head; Hugging Face rotates its two
    halves, and orders the rows accordingly.
    """

    def swap(weight: Tensor, axes: tuple[int, int]) -> Tensor:
        return weight.unflatten(0, (-1, *axes)).transpose(1, 2)  # [heads, .., .., d]

    half = head_dim // 2
    return Layout(
        lambda weight: swap(weight, (2, half)), lambda weight: swap(weight, (half, 2)).flatten(0, 2)
    )


def rope_from_config(given: Settings) -> dict[str, Any]:
    """Read the rotary embedding from ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling``.

    Args:
        given: the configuration; problems are added to it.

    Returns:
        Values by name of the arguments of ``llama_decoder``.
    """
    new, old = (given.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        given.problems.append(
            f"rope_parameters and rope_scaling must be sections, got {new!r} and {old!r}"
        )
        new = old = {}
    merged = {"rope_theta": given.values.get("rope_theta")}
    for section in (old, new):
        merged |= {key: value for key, value in section.items() if value is not None}
    rope = Settings(merged, "")
    rope.allow_only("partial_rotary_factor", 1.0)
    values = {"rope_base": rope.number("rope_theta", 10_000.0)}
    kinds = (rope.values.get("rope_type"), rope.values.get("type"))
    kind = next((kind for kind in kinds if kind is not None), "default")
    scaled = kind == "llama3"
    if not scaled and kind != "default":
        given.problems.append(f"rope type {kind!r} is not supported, only 'default' and 'llama3'")
    for key, (name, unscaled) in _SCALING.items():
        values[f"rope_{name}"] = float(rope.number(key)) if scaled else unscaled
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *(_SCALING if scaled else ())}
    unknown = [f"{key}={value!r}" for key, value in rope.values.items() if key not in known]
    if unknown and not given.problems:
        given.problems.append(
            f"rope_parameters or rope_scaling: {', '.join(unknown)} is not supported for type {kind!r}"
        )
    given.problems += [f"rope: {problem}" for problem in rope.problems]
    return values


def rope_from_module(rope: Any) -> dict[str, float]:
    """Read the rotary embedding of an attention module, as ``rope_from_config`` does."""
    if rope is None or type(rope).__name__ not in ("RotaryPositionalEmbeddings", "Llama3ScaledRoPE"):
        raise CheckpointError(f"Rotary embeddings of type {type(rope).__name__} are not Llama's.")
    values = {"rope_base": float(rope.base)}
    scaled = float(getattr(rope, "scale_factor", 1)) != 1
    for name, unscaled in _SCALING.values():
        values[f"rope_{name}"] = float(getattr(rope, name)) if scaled else unscaled
    return values


def rope_to_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rope_parameters`` for values as ``rope_from_config`` returns them."""
    if values["rope_scale_factor"] == 1:
        return {"rope_theta": values["rope_base"], "rope_type": "default"}
    scaling = {key: values[f"rope_{name}"] for key, (name, _) in _SCALING.items()}
    scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
    return {"rope_theta": values["rope_base"], "rope_type": "llama3", **scaling}
