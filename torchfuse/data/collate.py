"""Collation of samples, or packs of samples, with any number of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchfuse.data.media import MediaInput, collate_media
from torchfuse.errors import DataError

__all__ = ["EncodedMedia", "media_by_encoder", "padded_collate_images", "unnamed"]

EncodedMedia = tuple[list[MediaInput], Tensor]
"""The media of one sample for one encoder, and the encoder mask over their features."""

_UNNAMED: Final = ""


def padded_collate_images(
    batch: Sequence[Mapping[str, Any]],
    padding_idx: int = 0,
    ignore_idx: int = -100,
    *,
    pad_left: bool = False,
) -> dict[str, Any]:
    """Pad samples with any number of images each into a batch for a fused model.

    The signature is that of torchtune's collators, for the ``collate_fn`` of its recipes.

    Args:
        batch: samples, or packs of them from ``pack``, with

            * ``tokens``: ids, ``[s]``;
            * optional ``images``: ``[m, 3, h, w]``, ``m`` may be 0, or a list of ``MediaInput``;
            * with them ``encoder_mask``: bool ``[s, n]`` over the features of the images, one after the
              other (True: may attend), or ``[n]`` (True: belongs to the sample);
            * optional ``labels`` (ids, unshifted, ``ignore_idx`` at positions without loss),
              ``loss_weights``, ``document_ids`` and ``input_pos``, each ``[s]``.

            For named encoders ``images`` and ``encoder_mask`` are mappings by name.
        padding_idx: id that pads tokens.
        ignore_idx: label of padding.
        pad_left: whether padding comes first, as for generation.

    Returns:
        ``tokens`` ``[b, s]``, and likewise what else samples have: padding has ``loss_weights`` 0,
        ``document_ids`` -1 and ``input_pos`` 0. If any sample has an image: ``encoder_input``
        (``images`` ``[b, m, 3, h, w]``, or as ``collate_media`` returns it) and ``encoder_mask``
        ``[b, s, n]`` (``[b, n]`` if those of all samples are ``[n]``), False at padding tokens and
        padding images; by name for named encoders.

    Raises:
        DataError: if the batch is empty, only some samples have labels, document ids or positions, or a
            sample's tokens, images and ``encoder_mask`` do not agree.

    Examples:
        >>> image, none = torch.ones(1, 3, 8, 8), torch.ones(0, 3, 8, 8)
        >>> shown = {"tokens": [5], "images": image, "encoder_mask": torch.ones(1, 4).bool()}
        >>> text = {"tokens": [5, 6], "images": none, "encoder_mask": torch.ones(2, 0).bool()}
        >>> result = padded_collate_images([text, shown])
        >>> result["tokens"].tolist(), result["encoder_mask"].shape
        ([[5, 6], [5, 0]], torch.Size([2, 2, 4]))
    """
    if not batch:
        raise DataError("There is nothing to collate: the batch is empty.")
    side = "left" if pad_left else "right"
    padding = {"tokens": padding_idx, "labels": ignore_idx, "document_ids": -1, "input_pos": 0}
    result: dict[str, Any] = {
        key: pad_sequence(rows, True, float(value), side)
        for key, value in {**padding, "loss_weights": 0}.items()
        if (rows := _rows(batch, key))
    }
    media = [media_by_encoder(sample, f"Sample {row} of the batch") for row, sample in enumerate(batch)]
    inputs, masks = {}, {}
    for name in dict.fromkeys(name for sample in media for name in sample):
        given = [sample.get(name, ([], torch.ones(0, dtype=torch.bool))) for sample in media]
        if any(each for each, _ in given):
            inputs[name], real = collate_media([each for each, _ in given])
            features = real.flatten(1).repeat_interleave(_features_per_item(given), dim=1)
            masks[name] = _pad_masks([mask for _, mask in given], features, result["tokens"], pad_left)
    if inputs:
        result["encoder_input"], result["encoder_mask"] = unnamed(inputs), unnamed(masks)
    return result


def media_by_encoder(sample: Mapping[str, Any], what: str = "A sample") -> dict[str, EncodedMedia]:
    """Return the media and encoder masks of a sample by encoder; ``""`` is the one without a name.

    Args:
        sample: as for ``padded_collate_images``.
        what: the name of the sample, for messages.

    Raises:
        DataError: if tokens, images and ``encoder_mask`` do not agree.
    """
    images, masks = sample.get("images", {}), sample.get("encoder_mask", {})
    if not isinstance(images, Mapping):
        images, masks = {_UNNAMED: images}, {_UNNAMED: masks}
    result = {}
    for name, given in images.items():
        media = [MediaInput(x[None]) for x in given] if isinstance(given, Tensor) else list(given)
        mask, items = masks[name], sum(each.num_items for each in media)
        length, num = len(sample["tokens"]), mask.shape[-1]
        if (
            (num % items if items else num)
            or mask.dim() > 2
            or (mask.dim() == 2 and len(mask) != length)
        ):
            tiles = "" if items == len(media) else f" ({items} items)"
            raise DataError(
                f"{what} has {length} tokens and {len(media)} images{tiles}, but an encoder_mask of "
                f"{list(mask.shape)}."
            )
        result[name] = media, mask
    return result


def unnamed(by_encoder: dict[str, Any]) -> Any:
    """Return the value of the one encoder without a name, or all by name."""
    return by_encoder.get(_UNNAMED, by_encoder)


def _rows(batch: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
    """Return the values of all samples; an empty list if none has any."""
    without = [row for row, sample in enumerate(batch) if key not in sample]
    if len(without) == len(batch):
        return []
    if without and key != "loss_weights":
        raise DataError(f"Samples of one batch have {key} or none has; sample {without[0]} has none.")
    return [
        torch.as_tensor(sample[key]) if key in sample else torch.ones(len(sample["tokens"]))
        for sample in batch
    ]


def _features_per_item(rows: Sequence[EncodedMedia]) -> int:
    items = [(sum(each.num_items for each in media), mask.shape[-1]) for media, mask in rows]
    sizes = {num // count for count, num in items if count}
    if len(sizes) != 1:
        raise DataError(f"Images of one batch must have equally many features, got {sorted(sizes)}.")
    return sizes.pop()


def _pad_masks(masks: Sequence[Tensor], real: Tensor, tokens: Tensor, pad_left: bool) -> Tensor:
    """Put the masks of samples at their features, ``real`` ``[b, n]``, and at their tokens."""
    if all(mask.dim() == 1 for mask in masks):
        padded = torch.zeros_like(real)
        for row, mask in enumerate(masks):
            padded[row, real[row]] = mask
        return padded
    s = tokens.shape[1]
    padded = torch.zeros(*tokens.shape, real.shape[1], dtype=torch.bool)
    for row, mask in enumerate(masks):
        length = s if mask.dim() == 1 else len(mask)
        at = slice(s - length, None) if pad_left else slice(length)
        padded[row, at, real[row]] = mask
    return padded
