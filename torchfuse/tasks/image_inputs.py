"""Images in the shape that a model's tower takes: whole, or cut into tiles.

A tower of tiles (Mllama's) gets each whole image as one tile. It pads every image to its number of
tiles, and nothing may attend to the features of those. Images that a transform has cut into tiles are
passed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.data.media import MediaInput, collate_media
from torchfuse.naming import find_model, unwrap

__all__ = [
    "as_tiles",
    "drop_padding",
    "encode_each",
    "encode_images",
    "fit_to_encoder",
    "tokens_per_tile",
]


def fit_to_encoder(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose images and mask fit the model's encoder.

    Args:
        model: a fused model with one encoder, or a plain decoder.
        batch: what ``padded_collate_images`` made.

    Returns:
        The batch itself, or, for a tower of tiles, one with ``images`` ``[b, m, 1, c, h, w]`` and an
        ``encoder_mask`` that is False at the features of padding tiles.
    """
    given = batch.get("encoder_input", {})
    inputs = as_tiles(model, given)
    if inputs is given:
        return dict(batch)
    per_tile = tokens_per_tile(model)
    mask = batch["encoder_mask"].unflatten(2, (-1, per_tile))
    padding = _encoder(model).num_tokens - per_tile
    return {**batch, "encoder_input": inputs, "encoder_mask": F.pad(mask, (0, padding)).flatten(2)}


def encode_images(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the features of images, image by image, as the batch's ``encoder_mask`` covers them.

    Args:
        model: a fused model with one encoder.
        inputs: the encoder's keywords, with ``images``: normalised pixels ``[b, m, c, h, w]``, or tiles
            ``[b, m, t, c, h, w]``.

    Returns:
        ``[b, m * n, d]`` for ``n`` features an image: without those of padding tiles for whole images,
        with them for tiles.
    """
    tiles = as_tiles(model, inputs)
    features = model.encode(dict(tiles))
    if tiles is inputs:
        return features
    per_tile = tokens_per_tile(model)
    return features.unflatten(1, (inputs["images"].shape[1], -1))[:, :, :per_tile].flatten(1, 2)


def as_tiles(model: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the input of an encoder, for a tower of tiles with each whole image as one tile."""
    images = inputs.get("images")
    if tokens_per_tile(model) is None or images is None or images.dim() != 5:
        return inputs
    return {"images": images.unsqueeze(2)}


def encode_each(model: nn.Module, media: Sequence[MediaInput]) -> list[Tensor]:
    """Return the features of images one by one, each ``[1, t * n, d]`` for ``t`` tiles or frames."""
    device = next(model.parameters()).device
    inputs, real = collate_media([media])
    features = encode_images(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    by_item = features.unflatten(1, (real.numel(), -1))[:, real.flatten().to(device)]
    parts = by_item.split([each.num_items for each in media], dim=1)
    return [part.flatten(1, 2) for part in parts]


def drop_padding(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the features that no token attends to behind the others, and drop what all rows have of them.

    Args:
        features: ``[b, n, d]``.
        mask: the encoder mask, bool ``[b, s, n]``.

    Returns:
        Features and mask, with ``n`` as small as the row with most features allows.
    """
    real = mask.any(dim=1)
    order = (~real).int().argsort(dim=1, stable=True)[:, : int(real.sum(dim=1).max())]
    mask = mask.gather(2, order[:, None].expand(-1, mask.shape[1], -1))
    order = order.to(features.device)[..., None].expand(-1, -1, features.shape[2])
    return features.gather(1, order), mask


def tokens_per_tile(model: nn.Module) -> int | None:
    """Features of a tile, for an encoder that cuts images into tiles; None for any other."""
    return getattr(_encoder(model), "tokens_per_tile", None)


def _encoder(model: nn.Module) -> Any:
    owner: Any = unwrap(find_model(model))
    names = getattr(owner, "encoder_names", [])
    return unwrap(owner.get_encoder(names[0])) if names else None
