"""Features of a turn and their masks: one tensor, or several by the name of their encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["detach", "extend_mask", "num_features"]


def num_features(embeds: Tensor | Mapping[str, Tensor] | None) -> int:
    """Return the number of features of a row, over all encoders."""
    if embeds is None:
        return 0
    parts = [embeds] if isinstance(embeds, Tensor) else list(embeds.values())
    return sum(part.shape[-2] for part in parts)


def detach(embeds: Tensor | Mapping[str, Tensor]) -> Any:
    """Return features without gradient."""
    if isinstance(embeds, Mapping):
        return {name: part.detach() for name, part in embeds.items()}
    return embeds.detach()


def extend_mask(mask: Tensor | Mapping[str, Tensor] | None, length: int) -> Any:
    """Return a mask by token ``[b, s, n]`` with its first row repeated in front, ``[b, length, n]``."""
    if isinstance(mask, Mapping):
        return {name: extend_mask(part, length) for name, part in mask.items()}
    if mask is None or mask.dim() == 2 or mask.shape[1] == length:
        return mask
    front = mask[:, :1].expand(-1, length - mask.shape[1], -1)
    return torch.cat([front, mask], dim=1)
