"""Collation of samples with any number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchfuse.errors import DataError

__all__ = ["padded_collate_images"]


def padded_collate_images(
    batch: Sequence[dict[str, Any]],
    padding_idx: int = 0,
    ignore_idx: int = -100,
    *,
    pad_left: bool = False,
) -> dict[str, Any]:
    """Pad samples with any number of images each into a batch for a fused model.

    The signature is that of torchtune's collators, for the ``collate_fn`` of its recipes.

    Args:
        batch: samples with ``tokens`` (ids), ``images`` (``[m, 3, h, w]``, ``m`` may be 0),
            ``encoder_mask`` (bool ``[tokens, m * n]``, True: may attend) and, for training, ``labels``
            (ids, unshifted, ``ignore_idx`` at positions without loss).
        padding_idx: id that pads tokens.
        ignore_idx: label of padding.
        pad_left: whether padding comes first, as for generation.

    Returns:
        ``tokens`` ``[b, s]``, ``labels`` ``[b, s]`` if samples have them, and, if any sample has an
        image, ``encoder_input`` (``images`` ``[b, m, 3, h, w]``) and ``encoder_mask`` ``[b, s, m * n]``,
        False at padding tokens and padding images.

    Raises:
        DataError: if the batch is empty, or a sample's ``images`` and ``encoder_mask`` do not agree.
    """
    if not batch:
        raise DataError("There is nothing to collate: the batch is empty.")
    side = "left" if pad_left else "right"
    tokens = [torch.as_tensor(sample["tokens"]) for sample in batch]
    result: dict[str, Any] = {
        "tokens": pad_sequence(tokens, True, float(padding_idx), side),
    }
    if "labels" in batch[0]:
        labels = [torch.as_tensor(sample["labels"]) for sample in batch]
        result["labels"] = pad_sequence(labels, True, float(ignore_idx), side)
    num_images = max(len(sample["images"]) for sample in batch)
    if num_images:
        features = _features_per_image(batch)
        result["encoder_input"] = {
            "images": torch.stack([_pad_rows(sample["images"], num_images) for sample in batch])
        }
        mask = torch.zeros(*result["tokens"].shape, num_images * features, dtype=torch.bool)
        for row, sample in enumerate(batch):
            s, n = sample["encoder_mask"].shape
            at = slice(mask.shape[1] - s, None) if pad_left else slice(s)
            mask[row, at, :n] = sample["encoder_mask"]
        result["encoder_mask"] = mask
    return result


def _features_per_image(batch: Sequence[dict[str, Any]]) -> int:
    sizes = set()
    for row, sample in enumerate(batch):
        (s, n), images = sample["encoder_mask"].shape, len(sample["images"])
        if s != len(sample["tokens"]) or (n % images if images else n):
            raise DataError(
                f"Sample {row} of the batch has {len(sample['tokens'])} tokens and {images} images, but "
                f"an encoder_mask of {[s, n]}."
            )
        if images:
            sizes.add(n // images)
    if len(sizes) != 1:
        raise DataError(f"Images of one batch must have equally many features, got {sorted(sizes)}.")
    return int(sizes.pop())


def _pad_rows(images: Tensor, num_images: int) -> Tensor:
    padding = images.new_zeros(num_images - len(images), *images.shape[1:])
    return torch.cat([images, padding])
