"""The number of tokens of a batch by modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchfuse.data.encoder_items import UNNAMED
from torchfuse.data.loading.options import Encoder

__all__ = ["count_tokens"]


def count_tokens(batch: Mapping[str, Any], transform: Encoder) -> dict[str, int]:
    """Return the number of tokens of text and of images in a batch, without padding and markers.

    Args:
        batch: what ``padded_collate_images`` made.
        transform: the transform of its samples.

    Returns:
        ``text`` and ``image``; of a model with named encoders ``text`` and the name of each.
    """
    ids, masks, formats = batch["tokens"], batch.get("encoder_mask", {}), transform.formats.by_encoder
    markers = [each.token for each in formats.values() if each.token is not None]
    counts = {"text": int((~torch.isin(ids, torch.tensor([transform.pad_id, *markers]))).sum())}
    by_name = masks if isinstance(masks, Mapping) else {UNNAMED: masks}
    for name in formats:  # all of them, so that every rank has the same
        mask = by_name.get(name)
        features = 0 if mask is None else int((mask.any(dim=1) if mask.dim() == 3 else mask).sum())
        counts[name or "image"] = features
    return counts
