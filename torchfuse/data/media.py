"""Images, clips and other media as tensors for an encoder, and their collation.

A media transform turns a ``Media`` into a ``MediaInput``. All media are sequences of items, which an
encoder encodes one by one: an image is one item, a tiled image has one for each tile, a video one for
each frame. With ``n`` features an item, media of ``t`` items have ``t * n`` features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchfuse.data.samples import Media
from torchfuse.errors import DataError

__all__ = ["MediaInput", "MediaTransform", "as_media_input", "collate_media", "stack_images"]


@dataclass(frozen=True)
class MediaInput:
    """One image, clip or recording as its encoder takes it, without the axes of the batch.

    Attributes:
        items: ``[t, ...]``, for images ``[t, 3, h, w]``: a whole image (``t`` is 1), tiles or frames.
        keyword: the encoder's name of ``items``.
        extras: the encoder's other keywords, a tensor of any shape for each: of the media as a whole.
        max_items: None: the encoder takes the items of all media of a row as one sequence
            ``[b, f, ...]``. A number: it takes ``[b, m, t, ...]``, and returns features of this many
            items for each of the ``m`` media, those of its ``t`` items first.
        size: height and width of the image that tiles were cut from.
    """

    items: Tensor
    keyword: str = "images"
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    max_items: int | None = None
    size: tuple[int, int] | None = None

    @property
    def num_items(self) -> int:
        """The number of items, ``t``."""
        return len(self.items)


class MediaTransform(Protocol):
    """A function that reads a media file; a tensor that it returns is one item."""

    def __call__(self, media: Media, /) -> MediaInput | Tensor: ...


def as_media_input(result: MediaInput | Tensor) -> MediaInput:
    """Return the result of an image or media transform as ``MediaInput``; a tensor is one item."""
    return MediaInput(result[None]) if isinstance(result, Tensor) else result


def collate_media(rows: Sequence[Sequence[MediaInput]]) -> tuple[dict[str, Tensor], Tensor]:
    """Pad the media of rows, any number in each, into the input of one encoder.

    Args:
        rows: the media of each row, at least one in all.

    Returns:
        The encoder's keywords: items ``[b, f, ...]``, or ``[b, m, t, ...]`` where ``max_items`` is set,
        and extras ``[b, m, ...]``, padded with zeros. And which items are real, bool ``[b, f]`` or
        ``[b, m, max_items]``, True: real; ``repeat_interleave(n, -1)`` gives features.

    Raises:
        DataError: if the media differ in keywords, in ``max_items`` or in the shape of an item.

    Examples:
        >>> image, clip = MediaInput(torch.ones(1, 3, 8, 8)), MediaInput(torch.ones(2, 3, 8, 8))
        >>> inputs, real = collate_media([[image], [image, clip], []])
        >>> inputs["images"].shape, real.int().tolist()
        (torch.Size([3, 3, 3, 8, 8]), [[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    """
    media = [media for row in rows for media in row]
    if not media:
        raise DataError("There are no media to collate.")
    kinds = {
        (each.keyword, each.max_items, tuple(each.items.shape[1:]), *sorted(each.extras))
        for each in media
    }
    if len(kinds) != 1:
        raise DataError(
            "Media of one batch must have the same keywords, max_items and shape of an item, got "
            f"{sorted(map(str, kinds))}."
        )
    keyword, max_items = media[0].keyword, media[0].max_items
    extras = {
        name: _by_media([[each.extras[name] for each in row] for row in rows])
        for name in media[0].extras
    }
    if max_items is None:
        none = media[0].items[:0]
        items = [torch.cat([none, *(each.items for each in row)]) for row in rows]
        real = [torch.ones(len(row), dtype=torch.bool) for row in items]
        return {keyword: pad_sequence(items, True), **extras}, pad_sequence(real, True)
    most = max(each.num_items for each in media)
    if most > max_items:
        raise DataError(f"Media have up to {most} items, and max_items is {max_items}.")
    tiles = [[_pad_items(each.items, most) for each in row] for row in rows]
    are_real = [[torch.arange(max_items) < each.num_items for each in row] for row in rows]
    return {keyword: _by_media(tiles), **extras}, _by_media(are_real)


def stack_images(media: list[MediaInput], size: tuple[int, int] | None) -> Tensor | list[MediaInput]:
    """Return media as one tensor ``[m, 3, h, w]`` if each is an image of one item.

    Args:
        media: the media of a sample for one encoder.
        size: height and width of images, for a sample without any.
    """
    if any(each.num_items != 1 or each.extras or each.keyword != "images" for each in media):
        return media
    if media:
        return torch.cat([each.items for each in media])
    return [] if size is None else torch.empty(0, 3, *size)


def _by_media(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Stack tensors of one shape to ``[b, m, ...]``, padded with zeros."""
    some = next(tensor for row in rows for tensor in row)
    none = some.new_zeros(0, *some.shape)
    return pad_sequence([torch.stack(list(row)) if row else none for row in rows], True)


def _pad_items(items: Tensor, num_items: int) -> Tensor:
    return torch.cat([items, items.new_zeros(num_items - len(items), *items.shape[1:])])
