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

    Returns:
        ``text`` and ``image``; of a model with named encoders ``text`` and each that has features.
    """
    ids, images, masks = batch["tokens"], transform.image_token, batch.get("encoder_mask")
    markers = [*images.values()] if isinstance(images, Mapping) else [images]
    others = [transform.pad_id, *(marker for marker in markers if marker is not None)]
    text = {"text": int((~torch.isin(ids, torch.tensor(others))).sum())}
    if masks is None:
        return {**text, "image": 0}
    by_name = masks if isinstance(masks, Mapping) else {"image": masks}
    counts = {name: (m.any(dim=1) if m.dim() == 3 else m).sum() for name, m in by_name.items()}
    return text | {name: int(count) for name, count in counts.items()}
