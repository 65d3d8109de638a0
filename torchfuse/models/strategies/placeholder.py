"""Features in place of placeholder tokens: which feature a placeholder gets, and at which position.

Shapes are static: where a feature goes is an index computed from the tokens, and what does not count is
masked out, never cut out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.models.types import EncoderFeatures

__all__ = ["check_counts", "is_flat", "pick_features", "positions_by_modality"]


def is_flat(embeds: Tensor, tokens: Tensor) -> bool:
    """Return whether features are counted over the whole batch, as torchtune does, and not by row."""
    return embeds.shape[0] != tokens.shape[0]


def pick_features(given: EncoderFeatures, is_placeholder: Tensor) -> Tensor:
    """Return for every position the feature of its placeholder.

    The k-th placeholder of a row gets the k-th feature that belongs to the row.

    Args:
        given: features ``[b, n, d]``.
        is_placeholder: bool ``[b, s]``, True at placeholders.

    Returns:
        ``[b, s, d]``; the values at other positions have no meaning.
    """
    embeds = given.embeds
    if is_flat(embeds, is_placeholder):
        embeds = embeds.flatten(0, 1)  # [features of the batch, d]
        rank = (is_placeholder.flatten().cumsum(0) - 1).clamp(min=0, max=embeds.shape[0] - 1)
        return embeds[rank].unflatten(0, is_placeholder.shape)
    rank = (is_placeholder.cumsum(dim=1) - 1).clamp(min=0, max=embeds.shape[1] - 1)  # [b, s]
    valid = _valid_by_row(given)
    if valid is not None:  # features that belong to the row come first, in their order
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)
        rank = order.gather(1, rank)
    return embeds.gather(1, rank.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))


def check_counts(
    name: str, token: int, is_placeholder: Tensor, given: EncoderFeatures | None, *, strict: bool = True
) -> None:
    """Compare placeholders with features, row by row, before the decoder runs.

    On the CPU a difference is an error. On an accelerator reading the counts would synchronize the
    device, and a graph cannot raise, so there it is an assertion on the device; the collator has made
    the same comparison before.

    Args:
        name: the encoder's, for the message.
        token: id of its placeholder.
        is_placeholder: bool ``[b, s]``, True at placeholders.
        given: the features for them, if there are any.
        strict: whether more features than placeholders are an error. False: the surplus is padding.

    Raises:
        ModelError: naming encoder, rows, and the number of placeholders and features.
    """
    tokens, features, row_name = _counts(is_placeholder, given)
    fits = tokens == features if strict else tokens <= features
    if fits.device.type == "meta":
        return
    if fits.device.type != "cpu" or torch.compiler.is_compiling() or type(fits) is not Tensor:
        what = f"tokens {token} and features of encoder {name!r} differ in number"
        torch._assert_async(fits.all(), what)
        return
    wrong = (~fits).nonzero().flatten().tolist()
    if not wrong:
        return
    rows = "; ".join(
        f"{row_name.format(row)} has {int(tokens[row])} tokens and {int(features[row])} features"
        for row in wrong[:8]
    )
    more = f"; so do {len(wrong) - 8} more rows" if len(wrong) > 8 else ""
    raise ModelError(
        f"Encoder {name!r}: every token {token} needs one feature, but {rows}{more}. Were rows "
        "truncated in the middle of an image, or is the encoder input (or the encoder_mask) that "
        "belongs to them missing?"
    )


def positions_by_modality(
    places: Mapping[str, Tensor], input_pos: Tensor, earlier: Mapping[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Count the positions of text and of each modality separately.

    Args:
        places: bool ``[b, s]`` by name of the modality (text has none), True at its tokens.
        input_pos: positions that count all tokens, ``[b, s]``. Where they start at 0 again, as in rows
            of several documents, so does every count.
        earlier: with caches: how many tokens of each modality came in earlier calls, ``[b, 1]``, by
            name; counts continue from there. None: there are no caches.

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
            start = torch.where(input_pos == 0, before, 0).cummax(dim=1).values
            before = before - start
        elif name in earlier:
            before, counts[name] = before + earlier[name], counts[name] + earlier[name]
        own[name] = before
        text = text - before
    positions = text.clamp(min=0)
    for name, place in places.items():
        positions = torch.where(place, own[name], positions)
    return positions, counts


def _valid_by_row(given: EncoderFeatures) -> Tensor | None:
    """Which features belong to each row, bool ``[b, n]``; None: all."""
    if given.mask is None or given.mask.dim() == 2:
        return given.mask
    return given.mask.any(dim=1)


def _counts(is_placeholder: Tensor, given: EncoderFeatures | None) -> tuple[Tensor, Tensor, str]:
    """Placeholders and features (both ``[b]``, or ``[1]`` for flat ones), and the name of an entry."""
    tokens = is_placeholder.sum(dim=1)
    if given is None or not given.present:
        return tokens, torch.zeros_like(tokens), "row {}"
    embeds, valid = given.embeds, _valid_by_row(given)
    if is_flat(embeds, is_placeholder):
        tokens = tokens.sum(dim=0, keepdim=True)
        return tokens, torch.full_like(tokens, embeds.shape[:2].numel()), "the batch"
    if valid is not None:
        return tokens, valid.sum(dim=1), "row {}"
    return tokens, torch.full_like(tokens, embeds.shape[1]), "row {}"
