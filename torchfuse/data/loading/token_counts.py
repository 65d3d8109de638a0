"""The number of tokens of a batch by modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchfuse.data.loading.options import Encoder

__all__ = ["count_tokens"]


def count_tokens(batch: Mapping[str, Any], transform: Encoder) -> dict[str, int]:
    """Return the number of tokens of text and of images in a batch, without padding and markers.

    Args:
        batch: what ``padded_collate_images`` made.
        transform: the transform of its samples.
    """
    ids, mask = batch["tokens"], batch.get("encoder_mask")
    others = [transform.pad_id]
    if transform.image_token is not None:
        others.append(transform.image_token)
    return {
        "text": int((~torch.isin(ids, torch.tensor(others))).sum()),
        "image": 0 if mask is None else int((mask.any(dim=1) if mask.dim() == 3 else mask).sum()),
    }
