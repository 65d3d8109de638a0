"""Several samples as the documents of one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from torchfuse.data.collate import EncodedMedia, media_by_encoder, unnamed
from torchfuse.data.truncate import sequence_length

__all__ = ["ImageLayout", "merge_documents"]

ImageLayout = Literal["marker", "placeholder", "prefix"]

_PADDING: Final = -1  # the document of padding


def merge_documents(
    samples: Sequence[Mapping[str, Any]],
    max_seq_len: int,
    *,
    layout: ImageLayout = "marker",
    padding_idx: int = 0,
    ignore_idx: int = -100,
) -> dict[str, Any]:
    """Concatenate samples to one sequence, and pad it.

    Args:
        samples: samples as for ``padded_collate_images``.
        max_seq_len: positions of the sequence, at least as many as the samples take together.
        layout: see ``pack``.
        padding_idx: id that pads tokens.
        ignore_idx: label of positions without loss.

    Returns:
        A sample that has also ``document_ids`` (0, 1, ...; -1 at padding) and ``input_pos``, which
        starts at 0 in each document. The label of a document's first token is ``ignore_idx``: it is not
        learned from the document before.
    """
    lengths = [len(sample["tokens"]) for sample in samples]
    taken = sum(sequence_length(sample, prefix=layout == "prefix") for sample in samples)
    room = max_seq_len - taken
    documents = torch.tensor([*range(len(samples)), _PADDING])
    merged: dict[str, Any] = {
        "tokens": _concatenate([sample["tokens"] for sample in samples], room, padding_idx),
        "document_ids": documents.repeat_interleave(torch.tensor([*lengths, room])),
        "input_pos": torch.cat([torch.arange(length) for length in [*lengths, room]]),
    }
    if "labels" in samples[0]:
        labels = [torch.as_tensor(sample["labels"]).clone() for sample in samples]
        for label in labels:
            label[:1] = ignore_idx  # it would be predicted from the document before
        merged["labels"] = _concatenate(labels, room, ignore_idx)
    if any("loss_weights" in sample for sample in samples):
        weights = [
            torch.as_tensor(sample.get("loss_weights", [1.0] * length), dtype=torch.float)
            for sample, length in zip(samples, lengths, strict=True)
        ]
        merged["loss_weights"] = _concatenate(weights, room, 0.0)
    return merged | _merge_media(samples, [*lengths, room], by_row=layout == "placeholder")


def _merge_media(
    samples: Sequence[Mapping[str, Any]], lengths: Sequence[int], *, by_row: bool
) -> dict[str, Any]:
    by_sample = [media_by_encoder(sample) for sample in samples]
    none: EncodedMedia = ([], torch.zeros(0, dtype=torch.bool))
    images, masks = {}, {}
    for name in dict.fromkeys(name for media in by_sample for name in media):
        given = [*(media.get(name, none) for media in by_sample), none]  # none: padding
        if any(media for media, _ in given):
            images[name] = [each for media, _ in given for each in media]
            masks[name] = _merge_masks([mask for _, mask in given], lengths, by_row=by_row)
    if not images:
        mask = _merge_masks([none[1]] * len(lengths), lengths, by_row=by_row)
        return {"images": [], "encoder_mask": mask}
    return {"images": unnamed(images), "encoder_mask": unnamed(masks)}


def _merge_masks(masks: Sequence[Tensor], lengths: Sequence[int], *, by_row: bool) -> Tensor:
    """Return the masks as blocks ``[s, n]``; by row ``[n]``: which features belong to a document."""
    if by_row:
        return torch.cat([mask if mask.dim() == 1 else mask.any(dim=0) for mask in masks])
    blocks = [mask.expand(length, -1) for mask, length in zip(masks, lengths, strict=True)]
    return torch.block_diag(*blocks)


def _concatenate(rows: Sequence[Any], room: int, padding: float) -> Tensor:
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.cat([*tensors, torch.full((room,), padding, dtype=tensors[0].dtype)])
