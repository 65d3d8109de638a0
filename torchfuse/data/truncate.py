"""Conversations that are too long: dropped, or cut between two turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch

from torchfuse.data.collate import EncodedMedia, media_by_encoder, unnamed
from torchfuse.errors import DataError

__all__ = ["TooLong", "cut_between_turns", "fit_to_length", "sequence_length"]

TooLong = Literal["drop", "cut", "error"]

_PER_TOKEN: Final = ("tokens", "labels", "loss_weights", "input_pos")


def sequence_length(sample: Mapping[str, Any], *, prefix: bool = False) -> int:
    """Return how many positions of the decoder a sample takes.

    Args:
        sample: as for ``padded_collate_images``.
        prefix: whether features take positions in front of the text.

    Raises:
        DataError: if tokens, images and ``encoder_mask`` do not agree.
    """
    features = sum(mask.shape[-1] for _, mask in media_by_encoder(sample).values())
    return len(sample["tokens"]) + (features if prefix else 0)


def fit_to_length(
    sample: Mapping[str, Any],
    max_seq_len: int,
    *,
    too_long: TooLong,
    prefix: bool = False,
    ignore_idx: int = -100,
) -> Mapping[str, Any] | None:
    """Return a sample itself if it is not too long, else what ``too_long`` says, see ``pack``.

    Args:
        sample: as for ``padded_collate_images``.
        max_seq_len: positions that there are.
        too_long: ``"drop"``: None; ``"cut"``: its first turns, None if they have nothing to learn.
        prefix: whether features take positions in front of the text.
        ignore_idx: label of positions without loss.

    Raises:
        DataError: if it is too long and ``too_long`` is ``"error"``.
    """
    length = sequence_length(sample, prefix=prefix)
    if length <= max_seq_len:
        return sample
    if too_long == "error":
        raise DataError(f"{length} tokens, and max_seq_len is {max_seq_len}.")
    if too_long == "drop":
        return None
    return cut_between_turns(sample, max_seq_len, prefix=prefix, ignore_idx=ignore_idx)


def cut_between_turns(
    sample: Mapping[str, Any], max_seq_len: int, *, prefix: bool = False, ignore_idx: int = -100
) -> dict[str, Any] | None:
    """Return the first turns of a sample that fit, with the images that are used in them.

    The cut is after the last supervised token of an answer, so never within an image.

    Args:
        sample: as for ``padded_collate_images``, with ``labels`` and an ``encoder_mask`` ``[s, n]``.
        max_seq_len: positions that there are.
        prefix: whether features take positions in front of the text.
        ignore_idx: label of positions without loss.

    Returns:
        A sample; None if no supervised token would be left.

    Examples:
        >>> sample = {"tokens": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, -100, 5, 6]}
        >>> sample |= {"images": torch.zeros(0, 3, 8, 8), "encoder_mask": torch.ones(6, 0).bool()}
        >>> cut_between_turns(sample, 5)["tokens"]
        [1, 2]
    """
    learned = torch.as_tensor(sample["labels"]) != ignore_idx
    if "loss_weights" in sample:
        learned &= torch.as_tensor(sample["loss_weights"]) > 0
    learned[:1] = False  # no token comes before it
    ends = (learned[:-1] & ~learned[1:]).nonzero().flatten() + 1
    for end in reversed(ends.tolist()):
        if end > max_seq_len:
            continue
        cut = _first_tokens(sample, end)
        if sequence_length(cut, prefix=prefix) <= max_seq_len:
            return cut
    return None


def _first_tokens(sample: Mapping[str, Any], length: int) -> dict[str, Any]:
    cut = {key: value[:length] if key in _PER_TOKEN else value for key, value in sample.items()}
    media = {name: _used(given, length) for name, given in media_by_encoder(sample).items()}
    if not media:
        return cut
    images, masks = ({name: each[i] for name, each in media.items()} for i in (0, 1))
    return {**cut, "images": unnamed(images), "encoder_mask": unnamed(masks)}


def _used(given: EncodedMedia, length: int) -> EncodedMedia:
    """Return the media that the first tokens may attend to, and the mask of those tokens."""
    media, mask = given
    mask = mask[:length]
    items = sum(each.num_items for each in media)
    each = mask.shape[-1] // items if items else 0
    parts = mask.split([media_input.num_items * each for media_input in media], dim=-1)
    used = [index for index, part in enumerate(parts) if part.any()]
    none = mask[:, :0]
    return [media[index] for index in used], torch.cat([none, *(parts[index] for index in used)], dim=-1)
