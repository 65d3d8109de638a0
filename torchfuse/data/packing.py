"""Packing: several conversations in one sequence of fixed length.

Conversations are much shorter than the longest of a batch, so in padded batches most positions are
padding. In a pack documents follow each other, positions restart with each, and ``document_ids`` tell
the model that nothing attends to another document. The images of all documents of a pack are encoded
in one call of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Generic, TypeVar, get_args

from torchfuse.data.documents import ImageLayout, merge_documents
from torchfuse.data.truncate import TooLong, fit_to_length, sequence_length
from torchfuse.errors import ConfigError, DataError

__all__ = ["FirstFit", "Packs", "pack"]

_COUNTS: Final = ("num_samples", "num_dropped", "num_cut")
_Item = TypeVar("_Item")
_Sample = Mapping[str, Any]


class FirstFit(Generic[_Item]):
    """Online bin packing: an item goes into the first open bin with room for it.

    If no bin has room and no further one may be opened, the fullest is closed. The result depends on
    the lengths and their order alone.

    Args:
        capacity: the room of a bin.
        max_open: how many bins are open at once.

    Raises:
        ConfigError: if either is below 1.

    Examples:
        >>> bins = FirstFit(10, max_open=2)
        >>> [bins.add(name, length) for name, length in zip("abcd", (6, 7, 4, 8))]
        [None, None, ['a', 'c'], None]
        >>> bins.pop(), bins.pop(), bins.pop()
        (['b'], ['d'], None)
    """

    def __init__(self, capacity: int, max_open: int = 8) -> None:
        if capacity < 1 or max_open < 1:
            raise ConfigError(
                f"Packs need room for a token, and one that is open: got {capacity} and {max_open}."
            )
        self.capacity, self.max_open = capacity, max_open
        self._open: list[tuple[list[_Item], int]] = []  # items and the room left, in order of opening

    def add(self, item: _Item, length: int) -> list[_Item] | None:
        """Add an item, at most ``capacity`` long; return the items of the bin that this closes."""
        for index, (items, room) in enumerate(self._open):
            if length <= room:
                items.append(item)
                self._open[index] = items, room - length
                return self._open.pop(index)[0] if length == room else None
        assert length <= self.capacity
        if length == self.capacity:
            return [item]
        closed = None
        if len(self._open) == self.max_open:
            fullest = min(range(self.max_open), key=lambda index: self._open[index][1])
            closed = self._open.pop(fullest)[0]
        self._open.append(([item], self.capacity - length))
        return closed

    def pop(self) -> list[_Item] | None:
        """Close the bin that was opened first, and return its items; None if no bin is open."""
        return self._open.pop(0)[0] if self._open else None

    def state_dict(self) -> dict[str, Any]:
        """Return the open bins; the items are not copied."""
        return {"open": [(list(items), room) for items, room in self._open]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the open bins of ``state_dict``."""
        self._open = [(list(items), room) for items, room in state["open"]]


class Packs(Iterator[dict[str, Any]]):
    """The packs of a stream of samples; ``pack`` builds them.

    Args:
        samples: the stream.
        bins: what is open at the start.
        fit: returns a sample that fits in a pack and its length; None for one to drop.
        merge: returns the pack of several samples.

    Attributes:
        num_samples: samples taken from the stream.
        num_dropped: how many of them were dropped, because they are too long.
        num_cut: how many of them were cut between turns.
    """

    def __init__(
        self,
        samples: Iterable[_Sample],
        bins: FirstFit[_Sample],
        fit: Callable[[_Sample], tuple[_Sample, int] | None],
        merge: Callable[[list[_Sample]], dict[str, Any]],
    ) -> None:
        self._samples, self._bins, self._fit, self._merge = iter(samples), bins, fit, merge
        self.num_samples = self.num_dropped = self.num_cut = 0

    def __next__(self) -> dict[str, Any]:
        for sample in self._samples:
            closed = self._add(sample)
            if closed is not None:
                return self._merge(closed)
        closed = self._bins.pop()
        if closed is None:
            raise StopIteration
        return self._merge(closed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last pack: samples of packs that are open, and the counts.

        To continue, pack a stream that begins after the first ``num_samples`` samples, and load it.
        """
        return {**self._bins.state_dict(), **{name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last pack of another iteration, see ``state_dict``."""
        self._bins.load_state_dict(state)
        for name in _COUNTS:
            setattr(self, name, state[name])

    def _add(self, sample: _Sample) -> list[_Sample] | None:
        try:
            fitted = self._fit(sample)
        except DataError as error:
            raise DataError(f"Sample {self.num_samples}: {error}") from error
        self.num_samples += 1
        if fitted is None:
            self.num_dropped += 1
            return None
        self.num_cut += fitted[0] is not sample
        return self._bins.add(*fitted)


def pack(
    samples: Iterable[_Sample],
    max_seq_len: int,
    *,
    layout: ImageLayout = "marker",
    too_long: TooLong = "drop",
    max_open: int = 8,
    padding_idx: int = 0,
    ignore_idx: int = -100,
) -> Packs:
    """Pack encoded samples into sequences of one length, as they come.

    A sample goes into the first open pack with room for it (first fit), so that the packs depend on the
    samples and their order alone. ``padded_collate_images`` makes a batch of packs, which a fused model
    takes as it is, without the labels.

    Args:
        samples: samples as for ``padded_collate_images``; any iterable, read as packs are needed.
        max_seq_len: positions of a pack, features in front of the text included; at most the decoder's.
        layout: what images are in the tokens. ``"marker"`` (for cross-attention): one token each;
            ``"placeholder"``: one token for each feature, and the encoder mask of a pack is ``[n]``;
            ``"prefix"``: none, so features take positions beside the tokens.
        too_long: what happens to a sample that is longer than a pack: ``"drop"``, ``"cut"`` between
            turns (see ``cut_between_turns``; dropped where that leaves nothing to learn), ``"error"``.
        max_open: packs that are filled at once. More of them waste fewer positions, and hold more images
            in memory.
        padding_idx: id that pads tokens.
        ignore_idx: label of positions without loss.

    Returns:
        An iterator of packs (see ``merge_documents``), with counts of what was dropped and cut, and a
        state to save.

    Raises:
        ConfigError: if an option is out of its range.
        DataError: while iterating, for a sample that is too long, if that is an error; if a sample's
            tokens, images and mask do not agree.

    Examples:
        >>> def sample(*tokens):
        ...     return {"tokens": tokens, "labels": tokens}
        >>> (packed,) = pack([sample(5, 6, 7), sample(8, 9)], 6)
        >>> packed["tokens"].tolist(), packed["labels"].tolist()
        ([5, 6, 7, 8, 9, 0], [-100, 6, 7, -100, 9, -100])
        >>> packed["document_ids"].tolist(), packed["input_pos"].tolist()
        ([0, 0, 0, 1, 1, -1], [0, 1, 2, 0, 1, 0])
    """
    for name, value, known in (("layout", layout, ImageLayout), ("too_long", too_long, TooLong)):
        if value not in get_args(known):
            raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}.")
    prefix = layout == "prefix"

    def fit(sample: _Sample) -> tuple[_Sample, int] | None:
        fitted = fit_to_length(
            sample, max_seq_len, too_long=too_long, prefix=prefix, ignore_idx=ignore_idx
        )
        return None if fitted is None else (fitted, sequence_length(fitted, prefix=prefix))

    merge = partial(
        merge_documents,
        max_seq_len=max_seq_len,
        layout=layout,
        padding_idx=padding_idx,
        ignore_idx=ignore_idx,
    )
    return Packs(samples, FirstFit(max_seq_len, max_open), fit, merge)
