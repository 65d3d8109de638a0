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

from torchfuse.data.collate import unnamed
from torchfuse.data.encoder_items import UNNAMED
from torchfuse.data.media import MediaInput, collate_media
from torchfuse.naming import find_model, unwrap

__all__ = [
    "as_tiles",
    "by_encoder",
    "drop_padding",
    "encode_each",
    "encode_images",
    "fit_to_encoder",
    "inputs_by_encoder",
    "tokens_per_tile",
]


def fit_to_encoder(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose images and masks fit the model's encoders.

    Args:
        model: a fused model, or a plain decoder.
        batch: what ``padded_collate_images`` made.

    Returns:
        The batch itself, or, for a tower of tiles, one with ``images`` ``[b, m, 1, c, h, w]`` and an
        ``encoder_mask`` that is False at the features of padding tiles.
    """
    if "encoder_input" not in batch:
        return dict(batch)
    inputs, masks = inputs_by_encoder(batch["encoder_input"]), by_encoder(batch["encoder_mask"])
    tiles = {name: as_tiles(model, given, name) for name, given in inputs.items()}
    for name, given in inputs.items():
        if tiles[name] is not given:
            per_tile: Any = tokens_per_tile(model, name)
            padding = _encoder(model, name).num_tokens - per_tile
            masks[name] = F.pad(masks[name].unflatten(2, (-1, per_tile)), (0, padding)).flatten(2)
    return {**batch, "encoder_input": unnamed(tiles), "encoder_mask": unnamed(masks)}


def encode_images(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the features of images, image by image, as the batch's ``encoder_mask`` covers them.

    Args:
        model: a fused model.
        inputs: the encoder's keywords, with ``images``: normalised pixels ``[b, m, c, h, w]``, or tiles
            ``[b, m, t, c, h, w]``. By name for named encoders.

    Returns:
        ``[b, m * n, d]`` for ``n`` features an image: without those of padding tiles for whole images,
        with them for tiles. By name for named encoders.
    """
    given = inputs_by_encoder(inputs)
    tiles = {name: as_tiles(model, each, name) for name, each in given.items()}
    features = by_encoder(model.encode(unnamed(tiles)))
    for name, each in given.items():
        if tiles[name] is not each:
            by_image = features[name].unflatten(1, (each["images"].shape[1], -1))
            features[name] = by_image[:, :, : tokens_per_tile(model, name)].flatten(1, 2)
    return unnamed(features)


def inputs_by_encoder(inputs: Mapping[str, Any]) -> dict[str, Mapping[str, Tensor]]:
    """Return the keywords of each encoder by name; ``""`` is the one without a name."""
    named = all(isinstance(given, Mapping) for given in inputs.values())
    return dict(inputs) if named else {UNNAMED: inputs}


def by_encoder(tensors: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return features or masks by the name of their encoder; ``""`` is the one without a name."""
    return dict(tensors) if isinstance(tensors, Mapping) else {UNNAMED: tensors}


def as_tiles(
    model: nn.Module, inputs: Mapping[str, Tensor], name: str = UNNAMED
) -> Mapping[str, Tensor]:
    """Return the input of an encoder, for a tower of tiles with each whole image as one tile."""
    images = inputs.get("images")
    if tokens_per_tile(model, name) is None or images is None or images.dim() != 5:
        return inputs
    return {"images": images.unsqueeze(2)}


def encode_each(model: nn.Module, media: Sequence[MediaInput], name: str = UNNAMED) -> list[Tensor]:
    """Return the features of media of one encoder one by one, each ``[1, t * n, d]`` for ``t`` items."""
    device = next(model.parameters()).device
    inputs, real = collate_media([media])
    given = {key: tensor.to(device) for key, tensor in inputs.items()}
    features = by_encoder(encode_images(model, unnamed({name: given})))[name]
    by_item = features.unflatten(1, (real.numel(), -1))[:, real.flatten().to(device)]
    parts = by_item.split([each.num_items for each in media], dim=1)
    return [part.flatten(1, 2) for part in parts]


def drop_padding(
    features: Tensor | Mapping[str, Tensor], mask: Tensor | Mapping[str, Tensor]
) -> tuple[Any, Any]:
    """Move the features that no token attends to behind the others, and drop what all rows have of them.

    Args:
        features: ``[b, n, d]``; by name for named encoders.
        mask: the encoder mask, bool ``[b, s, n]``; by name for named encoders.

    Returns:
        Features and mask, with ``n`` as small as the row with most features allows.
    """
    kept, masks = by_encoder(features), by_encoder(mask)
    for name, each in kept.items():
        real = masks[name].any(dim=1)
        order = (~real).int().argsort(dim=1, stable=True)[:, : int(real.sum(dim=1).max())]
        masks[name] = masks[name].gather(2, order[:, None].expand(-1, masks[name].shape[1], -1))
        kept[name] = each.gather(1, order.to(each.device)[..., None].expand(-1, -1, each.shape[2]))
    return unnamed(kept), unnamed(masks)


def tokens_per_tile(model: nn.Module, name: str = UNNAMED) -> int | None:
    """Features of a tile, for an encoder that cuts images into tiles; None for any other."""
    return getattr(_encoder(model, name), "tokens_per_tile", None)


def _encoder(model: nn.Module, name: str) -> Any:
    owner: Any = unwrap(find_model(model))
    names = [name] if name else getattr(owner, "encoder_names", [])
    return unwrap(owner.get_encoder(names[0])) if names else None
