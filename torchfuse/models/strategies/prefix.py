"""Features in front of the text: masks and positions of the longer sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.models.types import CacheState, EncoderFeatures
from torchfuse.modules.documents import positions_within

__all__ = ["Prefix", "by_row"]


@dataclass(frozen=True)
class Prefix:
    """Features in front of the text.

    Attributes:
        mask: bool ``[b, s, n]``, True: text position ``s`` may attend to prefix position ``n``.
        valid: bool ``[b, n]``, True: prefix position ``n`` belongs to the row.
        document_ids: where rows hold several documents: the document of each position of prefix and
            text, ``[b, n + s]``. None: a row is one.
    """

    mask: Tensor
    valid: Tensor
    document_ids: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> Prefix:
        """Build a prefix whose valid positions are those that any text position may attend to."""
        return cls(mask, mask.any(dim=1))

    @classmethod
    def of_documents(cls, mask: Tensor, document_ids: Tensor) -> Prefix:
        """Build a prefix each of whose positions belongs to the document that may attend to it.

        Args:
            mask: bool ``[b, s, n]``, True: may attend.
            document_ids: of the text, ``[b, s]``.
        """
        first = mask.view(torch.uint8).argmax(dim=1)  # the first text position that may attend
        own = document_ids.gather(1, first)  # [b, n]
        mask = mask & (document_ids[:, :, None] == own[:, None, :])
        return cls(mask, mask.any(dim=1), torch.cat([own, document_ids], dim=1))

    @classmethod
    def from_features(
        cls,
        tokens: Tensor,
        features: Sequence[EncoderFeatures],
        document_ids: Tensor | None = None,
    ) -> Prefix:
        """Build the prefix of the features of several encoders, one after the other.

        Args:
            tokens: ids of the text, ``[b, s]``.
            features: in the order of the encoders; none for a prefix of no length.
            document_ids: the document of each token, ``[b, s]``, where rows hold several.
        """
        masks = [torch.ones(*tokens.shape, 0, dtype=torch.bool, device=tokens.device)]
        for given in features:
            shape = (*tokens.shape, given.embeds.shape[1])
            if given.mask is None:
                masks.append(torch.ones(shape, dtype=torch.bool, device=tokens.device))
            else:
                mask = given.mask if given.mask.dim() == 3 else given.mask[:, None]
                masks.append(mask.expand(shape))
        mask = torch.cat(masks, dim=-1)
        return cls.from_mask(mask) if document_ids is None else cls.of_documents(mask, document_ids)

    @classmethod
    def from_cache(cls, state: CacheState, tokens: Tensor) -> Prefix:
        """Restore the prefix that caches hold, for the next tokens ``[b, s]``."""
        assert state.prefix_mask is not None
        assert state.prefix_valid is not None
        return cls(state.prefix_mask.expand(-1, tokens.shape[1], -1), state.prefix_valid)

    def to_cache(self) -> CacheState:
        """Return the state for later calls, whose tokens attend to what the last one attends to."""
        return CacheState(prefix_mask=self.mask[:, -1:], prefix_valid=self.valid)

    def text_mask(self, mask: Tensor) -> Tensor:
        """Put the prefix in front of what text may attend to, ``[b, s, n + width]``.

        Args:
            mask: bool ``[b, s, width]`` over text alone.
        """
        return torch.cat([self.mask, mask.expand(self.mask.shape[0], -1, -1)], dim=-1)

    def full_mask(self, mask: Tensor | None, *, slots: int | None) -> Tensor:
        """Return what prefix and text may attend to, ``[b, n + s, slots or n + s]``.

        Args:
            mask: the text's own, bool ``[b, s, s]`` (or as wide as the cache); None: causal.
            slots: width of the cache, if there is one.
        """
        _, s, n = self.mask.shape
        device = self.mask.device
        if mask is None:
            mask = torch.ones(1, s, s, dtype=torch.bool, device=device).tril()
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        # An invalid position attends to itself, so that its softmax is defined.
        itself = torch.eye(n, dtype=torch.bool, device=device)
        above = causal & self.valid[:, None] | itself
        if self.document_ids is not None:
            own = self.document_ids[:, :n]
            above = above & (own[:, :, None] == own[:, None, :])
        width = n + s if slots is None else slots
        below = self.text_mask(mask)[..., :width]
        return torch.cat([_widen(above, width), _widen(below, width)], dim=1)

    def text_positions(self, input_pos: Tensor) -> Tensor:
        """Return the positions of text ``[b, s]`` after the valid prefix positions of each row."""
        b, s, n = self.mask.shape
        if self.document_ids is None:
            before = self.valid.sum(dim=1, keepdim=True)
        else:
            own, text = self.document_ids.split([n, s], dim=1)
            before = ((text[:, :, None] == own[:, None, :]) & self.valid[:, None]).sum(dim=-1)
        return by_row(input_pos, b, s) + before

    def full_positions(self, input_pos: Tensor | None) -> Tensor:
        """Return the positions of prefix and text, ``[b, n + s]``."""
        if input_pos is None:
            input_pos = torch.arange(self.mask.shape[1], device=self.mask.device)
        (positions,) = self._positions([self.mask.shape[2]])
        return torch.cat([positions, self.text_positions(input_pos)], dim=1)

    def positions_by_modality(self, input_pos: Tensor | None, lengths: Sequence[int]) -> Tensor:
        """Count the positions of text and of each part of the prefix separately, ``[b, n + s]``.

        Args:
            input_pos: positions of text. None: ``0 .. s - 1``.
            lengths: of the parts.
        """
        b, s, _ = self.mask.shape
        if input_pos is None:
            input_pos = torch.arange(s, device=self.mask.device)
        return torch.cat([*self._positions(lengths), by_row(input_pos, b, s)], dim=1)

    def _positions(self, lengths: Sequence[int]) -> list[Tensor]:
        """Return the positions in each part of the prefix, counted within documents."""
        parts = self.valid.split(list(lengths), dim=1)
        if self.document_ids is None:
            return [(part.cumsum(dim=1) - 1).clamp(min=0) for part in parts]
        own = self.document_ids[:, : self.mask.shape[2]].split(list(lengths), dim=1)
        return [positions_within(ids, part) for ids, part in zip(own, parts, strict=True)]


def by_row(input_pos: Tensor, b: int, s: int) -> Tensor:
    """Return positions of any shape that a caller may give as ``[b, s]``."""
    # A step of one token may come as [b], everything else one-dimensional is [s].
    return (input_pos.view(-1, 1) if s == 1 else input_pos.view(-1, s)).expand(b, -1)


def _widen(mask: Tensor, width: int) -> Tensor:
    return F.pad(mask, (0, width - mask.shape[-1]))
