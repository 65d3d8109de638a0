"""Features in the decoder's sequence: what all architectures share whose features stand there.

``placeholder``: features replace the embeddings of the encoder's special token, row by row; the
sequence keeps its length and its positions. ``prefix``: features stand in front of the text and are
cut off again before the head; the tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.models.strategies.placement import (
    Prefix,
    by_row,
    check_counts,
    is_flat,
    pick_features,
    positions_by_modality,
)
from torchfuse.models.strategy import ModalityStrategy, check_rows
from torchfuse.models.types import EncoderFeatures, ModalityContext, StrategyModel
from torchfuse.modules.experts.routing import Routing, keep_in_graph

__all__ = ["Placement", "SequenceStrategy"]

Placement = Literal["placeholder", "prefix"]


@dataclass(frozen=True)
class _Sequence:
    """The sequence that a decoder runs on: the text's own where ``embeds`` is None."""

    mask: Tensor | None
    input_pos: Tensor | None
    embeds: Tensor | None = None
    slots: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, Tensor] | None = None
    valid: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SequenceStrategy(ModalityStrategy):
    """Features stand in the decoder's sequence.

    Args:
        placement: ``"placeholder"``: in place of the encoder's token; ``"prefix"``: in front of the
            text. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``; the
            strategy has the one that was chosen.
        encoder_token: the id whose embeddings are replaced, ``{name: id}`` for named encoders. It may
            lie outside the vocabulary, and is never generated. For ``"placeholder"`` only.

    With ``"placeholder"`` an encoder mask says which features belong to a row, and nothing else: the
    features are part of the sequence, where ``mask`` says what may attend to what.

    Raises:
        ModelError: if the token is missing, or given with ``"prefix"``.
    """

    routes_tokens: ClassVar[bool] = False
    """Whether layers are told which tokens are of which modality."""

    keeps_features: ClassVar[bool] = False
    """Whether they are handed the features, too."""

    counts_by_modality: ClassVar[bool] = False
    """Whether text has the positions that it would have alone, and each encoder's features theirs."""

    placement: Placement | None = None
    encoder_token: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.placement is None:
            chosen = "prefix" if self.encoder_token is None else "placeholder"
            object.__setattr__(self, "placement", chosen)
        if self.placement not in ("placeholder", "prefix"):
            raise ModelError(f'placement must be "placeholder" or "prefix", got {self.placement!r}.')
        if (self.placement == "placeholder") != (self.encoder_token is not None):
            raise ModelError(
                'placement="placeholder" needs encoder_token, the id in whose place features stand; '
                f'"prefix" has no use for one. Got placement={self.placement!r}, '
                f"encoder_token={self.encoder_token!r}."
            )

    def extra_tokens(self, num_features: int) -> int:
        return num_features if self.placement == "prefix" else 0

    def special_tokens(self) -> tuple[int, ...]:
        if self.encoder_token is None:
            return ()
        token = self.encoder_token
        return (token,) if isinstance(token, int) else tuple(token.values())

    def check_encoders(self, names: list[str]) -> None:
        if isinstance(self.encoder_token, Mapping):
            if set(self.encoder_token) != set(names):
                raise ModelError(
                    f"Encoder tokens must have the names of the encoders, {', '.join(names)}; got "
                    f"{', '.join(self.encoder_token) or 'none'}."
                )
            if len(set(self.encoder_token.values())) != len(self.encoder_token):
                raise ModelError(f"Encoders cannot share a token, got {dict(self.encoder_token)}.")
        elif self.encoder_token is not None and len(names) > 1:
            raise ModelError(
                f"The encoders {', '.join(names)} need a token each: encoder_token={{name: id}}."
            )

    def check_prompt(
        self,
        names: Sequence[str],
        tokens: Tensor,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
    ) -> None:
        if self.placement != "placeholder" or encoder_mask is None:
            return
        if isinstance(encoder_mask, Tensor):
            if len(names) > 1:  # which part of it is whose, only the features say
                return
            encoder_mask = {names[0]: encoder_mask}
        for name, mask in encoder_mask.items():
            if name in names and mask is not None and mask.shape[0] == tokens.shape[0]:
                row = mask if mask.dim() == 2 else mask.any(dim=1)
                given = EncoderFeatures(row.unsqueeze(-1), row)
                check_counts(name, self._token(name), tokens == self._token(name), given)

    def padding(self, model: StrategyModel, tokens: Tensor) -> Tensor | None:
        """Which tokens are padding, bool ``[b, s]``, for layers where tokens compete; None: none."""
        return None

    def prepare(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        *,
        mask: Tensor | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        input_pos: Tensor | None,
    ) -> ModalityContext:
        place = self._replace if self.placement == "placeholder" else self._prepend
        sequence = place(model, tokens, features, mask, input_pos)
        stand_ins = {name: given.embeds for name, given in features.items() if not given.present}
        embeds, padding = sequence.embeds, self.padding(model, tokens)
        if embeds is None:
            if not stand_ins and padding is None:
                return ModalityContext(tokens, mask=sequence.mask, input_pos=sequence.input_pos)
            embeds = model.tok_embeddings(tokens)
        for stand_in in stand_ins.values():
            embeds = keep_in_graph(embeds, stand_in)
        in_front = embeds.shape[1] - tokens.shape[1]
        routing = None
        if self.routes_tokens:
            text = None if padding is None else ~padding
            routing = Routing(sequence.slots, sequence.places, sequence.valid, text, stand_ins)
            if self.keeps_features:
                routing.keep_features(embeds)
        return ModalityContext(
            tokens,
            embeds,
            mask=sequence.mask,
            input_pos=sequence.input_pos,
            output_slice=slice(in_front, None) if in_front else None,
            routing=routing,
        )

    def _token(self, name: str) -> int:
        assert self.encoder_token is not None
        return self.encoder_token if isinstance(self.encoder_token, int) else self.encoder_token[name]

    def _replace(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        mask: Tensor | None,
        input_pos: Tensor | None,
    ) -> _Sequence:
        places = {name: tokens == self._token(name) for name in model.encoder_names}
        for name, place in places.items():
            given = features.get(name)
            if given is not None and given.mask is not None and is_flat(given.embeds, tokens):
                raise ModelError(
                    f"The features of {name!r} have {given.embeds.shape[0]} rows, the tokens "
                    f"{tokens.shape[0]}, so an encoder_mask cannot say which belong to a row. Give "
                    "features row by row, or no mask."
                )
            check_counts(name, self._token(name), place, given, strict=model.strict)
        present = {name: given for name, given in features.items() if given.present}
        places = {name: places[name] for name in present}
        if self.counts_by_modality:
            input_pos = self._count(model, tokens, places, input_pos)
        if not present:
            return _Sequence(mask, input_pos, places={})
        # A special token may lie outside the table: look up any row, it is replaced.
        anywhere = torch.stack(list(places.values())).any(dim=0)
        embeds = model.tok_embeddings(tokens.masked_fill(anywhere, 0))
        for name, given in present.items():
            picked = pick_features(given, places[name])
            embeds = torch.where(places[name].unsqueeze(-1), picked, embeds)
        slots = {name: _most_in_a_row(given, tokens) for name, given in present.items()}
        return _Sequence(mask, input_pos, embeds, slots, places)

    def _count(
        self,
        model: StrategyModel,
        tokens: Tensor,
        places: Mapping[str, Tensor],
        input_pos: Tensor | None,
    ) -> Tensor | None:
        """Positions by modality; with caches they go on where those of earlier calls ended."""
        cached = model.caches_are_enabled()
        earlier: dict[str, Tensor] | None = (model.cache_state or {}) if cached else None
        if not places and not earlier:
            return input_pos
        if input_pos is None:
            input_pos = torch.arange(tokens.shape[1], device=tokens.device)
        input_pos = by_row(input_pos, *tokens.shape)
        # What came earlier counts for text, also where none of it comes now.
        none = torch.zeros_like(tokens, dtype=torch.bool)
        everywhere = {name: places.get(name, none) for name in {**(earlier or {}), **places}}
        positions, counts = positions_by_modality(everywhere, input_pos, earlier)
        if cached and places:
            model.cache_state = counts
        return positions

    def _prepend(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        mask: Tensor | None,
        input_pos: Tensor | None,
    ) -> _Sequence:
        check_rows(tokens, features)
        present = {name: given for name, given in features.items() if given.present}
        cached = model.caches_are_enabled()
        earlier: Prefix | None = model.cache_state if cached else None
        if present and earlier is not None:
            raise ModelError(
                "The caches hold a sequence already, and features can only stand in front of one. Call "
                'reset_caches() first, or fuse with placement="placeholder" for images in later turns.'
            )
        if not present:
            if earlier is not None:
                assert mask is not None
                assert input_pos is not None
                prefix = earlier.seen_by(tokens)
                mask = prefix.text_mask(mask)[..., : mask.shape[-1]]
                if not self.counts_by_modality:
                    input_pos = prefix.text_positions(input_pos)
            elif cached:
                model.cache_state = Prefix.of_features(tokens, ()).last()
            return _Sequence(mask, input_pos)
        prefix = Prefix.of_features(tokens, list(present.values()))
        slots = {name: given.embeds.shape[1] for name, given in present.items()}
        plain = mask is None and input_pos is None and all(g.mask is None for g in present.values())
        if self.counts_by_modality:
            input_pos = prefix.positions_by_modality(input_pos, list(slots.values()))
        elif not plain:
            input_pos = prefix.full_positions(input_pos)
        if not plain:  # otherwise causal, which is what None means
            mask = prefix.full_mask(mask, slots=mask.shape[-1] if cached and mask is not None else None)
        if cached:
            model.cache_state = prefix.last()
        embeds = [*(given.embeds for given in present.values()), model.tok_embeddings(tokens)]
        valid = prefix.valid.split(list(slots.values()), dim=1)
        by_name = {n: v for n, v in zip(slots, valid, strict=True) if present[n].mask is not None}
        return _Sequence(mask, input_pos, torch.cat(embeds, dim=1), slots, valid=by_name)


def _most_in_a_row(given: EncoderFeatures, tokens: Tensor) -> int:
    """How many features a row can have at most."""
    num = given.embeds.shape[:2].numel() if is_flat(given.embeds, tokens) else given.embeds.shape[1]
    return min(num, tokens.shape[1])
