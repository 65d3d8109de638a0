"""Where features stand in the decoder's sequence: in place of a special token, or in front.

Everything here has static shapes: which feature goes where is an index computed from the tokens, and
what must not count is masked, never cut out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.models.types import EncoderFeatures

__all__ = ["Prefix", "by_row", "check_counts", "is_flat", "pick_features", "positions_by_modality"]


def is_flat(embeds: Tensor, tokens: Tensor) -> bool:
    """Whether features are counted through the batch, as torchtune does, instead of row by row."""
    return embeds.shape[0] != tokens.shape[0]


def features_of_row(given: EncoderFeatures) -> Tensor | None:
    """Which features belong to each row, bool ``[b, n]``; None: all."""
    if given.mask is None or given.mask.dim() == 2:
        return given.mask
    return given.mask.any(dim=1)


def pick_features(given: EncoderFeatures, place: Tensor) -> Tensor:
    """For every position the feature that would stand there.

    The k-th special token of a row gets the k-th feature that belongs to the row.

    Args:
        given: features ``[b, n, d]``.
        place: bool ``[b, s]``, True at special tokens.

    Returns:
        ``[b, s, d]``; what stands at other positions is of no meaning.
    """
    embeds = given.embeds
    if is_flat(embeds, place):
        embeds = embeds.flatten(0, 1)  # [features of the batch, d]
        rank = (place.flatten().cumsum(0) - 1).clamp(min=0, max=embeds.shape[0] - 1)
        return embeds[rank].unflatten(0, place.shape)
    rank = (place.cumsum(dim=1) - 1).clamp(min=0, max=embeds.shape[1] - 1)  # [b, s]
    valid = features_of_row(given)
    if valid is not None:  # features that belong to the row come first, in their order
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
        rank = order.gather(1, rank)
    return embeds.gather(1, rank.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))


def check_counts(
    name: str, token: int, place: Tensor, given: EncoderFeatures | None, *, strict: bool = True
) -> None:
    """Compare special tokens with features, row by row, before anything is written.

    On the CPU a difference is an error. On an accelerator looking at the counts would wait for the
    device, and in a graph there is nowhere to raise from, so there it is an assertion on the device;
    collation has made the same comparison by then.

    Args:
        name: the encoder's, for the message.
        token: id of its special token.
        place: bool ``[b, s]``, True where that token stands.
        given: the features for it, if there are any.
        strict: whether more features than tokens are an error. False: the ones left over are padding.

    Raises:
        ModelError: naming encoder, rows, tokens and features.
    """
    tokens, features, who = _counts(place, given)
    fits = tokens == features if strict else tokens <= features
    if place.device.type == "meta":
        return
    if place.device.type != "cpu" or torch.compiler.is_compiling() or type(place) is not Tensor:
        what = f"tokens {token} and features of encoder {name!r} differ in number"
        torch._assert_async(fits.all(), what)
        return
    wrong = (~fits).nonzero().flatten().tolist()
    if not wrong:
        return
    rows = "; ".join(
        f"{who.format(row)} has {int(tokens[row])} tokens and {int(features[row])} features"
        for row in wrong[:8]
    )
    more = f"; so do {len(wrong) - 8} more rows" if len(wrong) > 8 else ""
    raise ModelError(
        f"Encoder {name!r}: every token {token} stands for one feature, but {rows}{more}. Were rows "
        "truncated in the middle of an image, or is the encoder input (or the encoder_mask) that "
        "belongs to them missing?"
    )


def _counts(place: Tensor, given: EncoderFeatures | None) -> tuple[Tensor, Tensor, str]:
    """Tokens, features (both ``[b]``, or ``[1]`` for flat ones), and how to call an entry."""
    tokens = place.sum(dim=1)
    if given is None or not given.present:
        return tokens, torch.zeros_like(tokens), "row {}"
    embeds, valid = given.embeds, features_of_row(given)
    if is_flat(embeds, place):
        tokens = tokens.sum(dim=0, keepdim=True)
        return tokens, torch.full_like(tokens, embeds.shape[:2].numel()), "the batch"
    if valid is not None:
        return tokens, valid.sum(dim=1), "row {}"
    return tokens, torch.full_like(tokens, embeds.shape[1]), "row {}"


def positions_by_modality(
    places: Mapping[str, Tensor], input_pos: Tensor, earlier: Mapping[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions of text as if nothing else stood in it, and of each modality as if it stood alone.

    Args:
        places: where the tokens of each modality but text stand, bool ``[b, s]``, by name.
        input_pos: positions that count all tokens, ``[b, s]``. Where they begin at 0 again, as in rows
            of several documents, so does every count.
        earlier: with caches: how many tokens of each modality came in earlier calls, ``[b, 1]``, by
            name; positions only go on then. None: there are no caches.

    Returns:
        Positions ``[b, s]``, and ``earlier`` for the next call.

    Examples:
        >>> image = torch.tensor([[False, True, True, False, True, False]])
        >>> positions_by_modality({"image": image}, torch.arange(6)[None], None)[0].tolist()
        [[0, 0, 1, 1, 2, 2]]
    """
    text, own, counts = input_pos, {}, {}
    for name, place in places.items():
        before = place.cumsum(dim=1) - place.long()
        counts[name] = place.sum(dim=1, keepdim=True)
        if earlier is None:
            begins = torch.where(input_pos == 0, before, 0).cummax(dim=1).values
            before = before - begins
        elif name in earlier:
            before, counts[name] = before + earlier[name], counts[name] + earlier[name]
        own[name] = before
        text = text - before
    positions = text.clamp(min=0)
    for name, place in places.items():
        positions = torch.where(place, own[name], positions)
    return positions, counts


class Prefix:
    """Features in front of the text, and what that means for masks and positions.

    Args:
        sees: which text position may attend to which prefix position, bool ``[b, s, n]``.
        valid: which prefix positions count for each row, bool ``[b, n]``; those that any text sees
            unless given.
    """

    def __init__(self, sees: Tensor, valid: Tensor | None = None) -> None:
        self.sees = sees
        self.valid = sees.any(dim=1) if valid is None else valid

    @classmethod
    def of_features(cls, tokens: Tensor, features: Sequence[EncoderFeatures]) -> Prefix:
        """The prefix that features of several encoders form, one behind the other."""
        seen = [torch.ones(*tokens.shape, 0, dtype=torch.bool, device=tokens.device)]
        for given in features:
            shape = (*tokens.shape, given.embeds.shape[1])
            if given.mask is None:
                seen.append(torch.ones(shape, dtype=torch.bool, device=tokens.device))
            else:
                mask = given.mask if given.mask.dim() == 3 else given.mask[:, None]
                seen.append(mask.expand(shape))
        return cls(torch.cat(seen, dim=-1))

    def last(self) -> Prefix:
        """The prefix as the last text position sees it, for later calls on the same caches."""
        return Prefix(self.sees[:, -1:], self.valid)

    def clone(self) -> Prefix:
        """The same, in memory of its own."""
        return Prefix(self.sees.clone(), self.valid.clone())

    def seen_by(self, tokens: Tensor) -> Prefix:
        """The prefix as each of these tokens sees it, who all see what the last one did."""
        return Prefix(self.sees.expand(-1, tokens.shape[1], -1), self.valid)

    def text_mask(self, mask: Tensor) -> Tensor:
        """What text positions may attend to: the prefix, then what ``mask`` ``[b, s, t]`` allows."""
        return torch.cat([self.sees, mask.expand(self.sees.shape[0], -1, -1)], dim=-1)

    def full_mask(self, mask: Tensor | None, *, slots: int | None) -> Tensor:
        """What prefix and text may attend to, ``[b, n + s, slots or n + s]``.

        Args:
            mask: the text's own, bool ``[b, s, s]`` (or as wide as the cache); None: causal.
            slots: width of the cache, if there is one.
        """
        _, s, n = self.sees.shape
        device = self.sees.device
        if mask is None:
            mask = torch.ones(1, s, s, dtype=torch.bool, device=device).tril()
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        # A position that counts for nothing sees itself, so that its softmax is defined.
        itself = torch.eye(n, dtype=torch.bool, device=device)
        above = causal & self.valid[:, None] | itself
        width = n + s if slots is None else slots
        below = self.text_mask(mask)[..., :width]
        return torch.cat([_widen(above, width), _widen(below, width)], dim=1)

    def text_positions(self, input_pos: Tensor) -> Tensor:
        """Positions of text ``[b, s]``, behind as many prefix positions as count in each row."""
        b, s, _ = self.sees.shape
        return by_row(input_pos, b, s) + self.valid.sum(dim=1, keepdim=True)

    def full_positions(self, input_pos: Tensor | None) -> Tensor:
        """Positions of prefix and text, ``[b, n + s]``."""
        if input_pos is None:
            input_pos = torch.arange(self.sees.shape[1], device=self.sees.device)
        return torch.cat([_count(self.valid), self.text_positions(input_pos)], dim=1)

    def positions_by_modality(self, input_pos: Tensor | None, lengths: Sequence[int]) -> Tensor:
        """Positions ``[b, n + s]`` of text as without the prefix, and of each part of that by itself."""
        b, s, _ = self.sees.shape
        if input_pos is None:
            input_pos = torch.arange(s, device=self.sees.device)
        parts = [_count(part) for part in self.valid.split(list(lengths), dim=1)]
        return torch.cat([*parts, by_row(input_pos, b, s)], dim=1)


def by_row(input_pos: Tensor, b: int, s: int) -> Tensor:
    """Positions ``[b, s]`` in whatever shape a caller may give them."""
    # A step of one token may come as [b], everything else one-dimensional is [s].
    return (input_pos.view(-1, 1) if s == 1 else input_pos.view(-1, s)).expand(b, -1)


def _count(valid: Tensor) -> Tensor:
    return (valid.cumsum(dim=1) - 1).clamp(min=0)


def _widen(mask: Tensor, width: int) -> Tensor:
    return F.pad(mask, (0, width - mask.shape[-1]))
