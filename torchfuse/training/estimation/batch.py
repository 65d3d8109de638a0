"""A batch of a given size for a fused model, of tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.models.strategy import features_per_image
from torchfuse.naming import find_model, unwrap

__all__ = ["example_batch"]


def example_batch(
    model: nn.Module, *, rows: int, length: int, images: int, features_cached: bool = False
) -> dict[str, Any]:
    """Return arguments of a fused model's ``forward``.

    Call it inside of a ``FakeTensorMode``: the tensors have no defined values.

    Args:
        model: a fused model.
        rows: rows of the batch.
        length: positions of the decoder's sequence, with the features that are in it.
        images: images of each row, for each encoder; of a tiled encoder each with all of its tiles.
        features_cached: whether encoders get their features instead of images.

    Returns:
        ``tokens`` ``[b, s]``, ``encoder_input`` and, where features are not in the sequence,
        ``encoder_mask`` ``[b, s, n]``.

    Raises:
        ConfigError: if the features leave no space for text.
    """
    owner: Any = unwrap(find_model(model))
    names = owner.encoder_names
    features = {name: images * features_per_image(owner, name) for name in names}
    total = sum(features.values())
    in_front = owner.strategy.extra_tokens(total)
    in_sequence = in_front or (total if owner.strategy.special_tokens() else 0)
    if length <= in_sequence:
        raise ConfigError(
            f"A sequence of {length} tokens has no space for text beside the features of {images} "
            f"images ({in_sequence}): give fewer images, or a longer sequence."
        )
    batch: dict[str, Any] = {"tokens": torch.empty(rows, length - in_front, dtype=torch.long)}
    if not images:
        return batch
    inputs = {
        name: _features(owner, name, rows, images)
        if features_cached
        else _images(unwrap(owner.get_encoder(name)), rows, images)
        for name in names
    }
    unnamed = names == ["encoder"] and hasattr(owner, "encoder")
    batch["encoder_input"] = inputs["encoder"] if unnamed else inputs
    if not in_sequence:
        batch["encoder_mask"] = torch.empty(rows, length, total, dtype=torch.bool)
    return batch


def _images(encoder: Any, rows: int, images: int) -> dict[str, Tensor]:
    """Return an encoder's keywords for images of its size."""
    if hasattr(encoder, "tokens_per_tile"):
        example = encoder.example_input()
        tile = example["images"].shape[-3:]
        return {
            "images": torch.empty(rows, images, encoder.max_num_tiles, *tile),
            "aspect_ratio": torch.empty(rows, images, 2, dtype=torch.long),
        }
    return {
        name: torch.empty(rows, images, *tensor.shape[1:], dtype=tensor.dtype)
        for name, tensor in encoder.example_input().items()
    }


def _features(owner: Any, name: str, rows: int, images: int) -> dict[str, Tensor]:
    """Return an encoder's output, before the adapter, as the keyword that takes its place."""
    encoder: Any = unwrap(owner.get_encoder(name))
    width = getattr(encoder, "feature_dim", None) or getattr(encoder, "embed_dim", None)
    width = width or encoder.config.hidden_size
    return {"encoder_output": torch.empty(rows, images * encoder.num_tokens, width)}
