"""Features in the decoder's sequence: what all architectures share that put them there.

``placeholder``: features replace the embeddings of a placeholder token, row by row; the sequence keeps
its length and its positions. ``prefix``: features go in front of the text and are cut off before the
head; the tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.documents import check_documents
from torchfuse.models.strategies.placeholder import (
    check_counts,
    is_flat,
    pick_features,
    positions_by_modality,
)
from torchfuse.models.strategies.prefix import Prefix, by_row
from torchfuse.models.strategy import ModalityStrategy, check_rows
from torchfuse.models.types import CacheState, EncoderFeatures, ModalityContext, StrategyModel
from torchfuse.modules.documents import with_block_kernel
from torchfuse.modules.experts.routing import Routing, keep_in_graph

__all__ = ["Placement", "SequenceStrategy"]

Placement = Literal["placeholder", "prefix"]


@dataclass(frozen=True)
class _Sequence:
    """The sequence that the decoder runs on; the text alone if ``embeds`` is None."""

    mask: Tensor | None
    input_pos: Tensor | None
    embeds: Tensor | None = None
    slots: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, Tensor] | None = None
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    state: CacheState | None = None


@dataclass(frozen=True)
class SequenceStrategy(ModalityStrategy):
    """Features are part of the decoder's sequence.

    With ``"placeholder"`` an encoder mask tells which features belong to a row, and nothing else: the
    features are part of the sequence, whose ``mask`` tells what may attend to what.

    Args:
        placement: ``"placeholder"``: in place of the encoder's token; ``"prefix"``: in front of the
            text. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``; the
            attribute holds the one that was chosen.
        encoder_token: id of the placeholder, ``{name: id}`` for named encoders. It may lie outside the
            vocabulary, and is never generated. For ``"placeholder"`` only.

    Raises:
        ConfigError: if the token is missing, or given with ``"prefix"``.
    """

    routes_tokens: ClassVar[bool] = False
    """Whether layers get the modality of each token."""

    routes_features: ClassVar[bool] = False
    """Whether they get the features, too."""

    takes_documents: ClassVar[bool] = True

    counts_by_modality: ClassVar[bool] = False
    """Whether positions of text and of each encoder's features are counted separately."""

    placement: Placement | None = None
    encoder_token: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.placement is None:
            chosen = "prefix" if self.encoder_token is None else "placeholder"
            object.__setattr__(self, "placement", chosen)
        if self.placement not in ("placeholder", "prefix"):
            raise ConfigError(f'placement must be "placeholder" or "prefix", got {self.placement!r}.')
        if (self.placement == "placeholder") != (self.encoder_token is not None):
            raise ConfigError(
                'placement="placeholder" needs encoder_token, the id of the placeholder, and "prefix" '
                f"takes none. Got placement={self.placement!r}, encoder_token={self.encoder_token!r}."
            )

    def extra_tokens(self, num_features: int) -> int:
        return num_features if self.placement == "prefix" else 0

    def special_tokens(self) -> tuple[int, ...]:
        if self.encoder_token is None:
            return ()
        token = self.encoder_token
        return (token,) if isinstance(token, int) else tuple(token.values())

    def placeholder(self, encoder: str) -> int | None:
        return None if self.encoder_token is None else self._token(encoder)

    def check_encoders(self, names: list[str]) -> None:
        if isinstance(self.encoder_token, Mapping):
            if set(self.encoder_token) != set(names):
                raise ConfigError(
                    f"Encoder tokens must have the names of the encoders, {', '.join(names)}; got "
                    f"{', '.join(self.encoder_token) or 'none'}."
                )
            if len(set(self.encoder_token.values())) != len(self.encoder_token):
                raise ConfigError(f"Encoders cannot share a token, got {dict(self.encoder_token)}.")
        elif self.encoder_token is not None and len(names) > 1:
            raise ConfigError(
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
            if len(names) > 1:  # how it is split is known with the features only
                return
            encoder_mask = {names[0]: encoder_mask}
        for name, mask in encoder_mask.items():
            if name in names and mask is not None and mask.shape[0] == tokens.shape[0]:
                row = mask if mask.dim() == 2 else mask.any(dim=1)
                given = EncoderFeatures(row.unsqueeze(-1), row)
                check_counts(name, self._token(name), tokens == self._token(name), given)

    def padding(
        self, model: StrategyModel, tokens: Tensor, document_ids: Tensor | None
    ) -> Tensor | None:
        """Return which tokens are padding, bool ``[b, s]``, for layers where tokens compete."""
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
        document_ids: Tensor | None = None,
    ) -> ModalityContext:
        if self.placement == "placeholder":
            sequence = self._replace(model, tokens, features, mask, input_pos)
        else:
            sequence = self._prepend(model, tokens, features, mask, input_pos, document_ids)
        stand_ins = {name: given.embeds for name, given in features.items() if not given.present}
        embeds, padding = sequence.embeds, self.padding(model, tokens, document_ids)
        if embeds is None and not stand_ins and padding is None:
            return ModalityContext(
                tokens, mask=sequence.mask, input_pos=sequence.input_pos, cache_state=sequence.state
            )
        if embeds is None:
            embeds = model.tok_embeddings(tokens)
        for stand_in in stand_ins.values():
            embeds = keep_in_graph(embeds, stand_in)
        routing = None
        if self.routes_tokens:
            text = None if padding is None else ~padding
            routing = Routing(sequence.slots, sequence.places, sequence.valid, text, stand_ins)
            if self.routes_features:
                routing.keep_features(embeds)
        in_front = embeds.shape[1] - tokens.shape[1]
        return ModalityContext(
            tokens,
            embeds,
            mask=sequence.mask,
            input_pos=sequence.input_pos,
            output_slice=slice(in_front, None) if in_front else None,
            routing=routing,
            cache_state=sequence.state,
            document_ids=document_ids,
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
        """Put features in place of placeholders."""
        places = {name: tokens == self._token(name) for name in model.encoder_names}
        for name, place in places.items():
            given = features.get(name)
            if given is not None and given.mask is not None and is_flat(given.embeds, tokens):
                raise ModelError(
                    f"The features of {name!r} have {given.embeds.shape[0]} rows, the tokens "
                    f"{tokens.shape[0]}, so an encoder_mask cannot tell which belong to a row. Give "
                    "features row by row, or no mask."
                )
            check_counts(name, self._token(name), place, given, strict=model.strict)
        present = {name: given for name, given in features.items() if given.present}
        places = {name: places[name] for name in present}
        state = None
        if self.counts_by_modality:
            input_pos, state = self._count(model, tokens, places, input_pos)
        if not present:
            return _Sequence(mask, input_pos, places={}, state=state)
        # A placeholder may lie outside the table: look up row 0, which is replaced.
        anywhere = torch.stack(list(places.values())).any(dim=0)
        embeds = model.tok_embeddings(tokens.masked_fill(anywhere, 0))
        for name, given in present.items():
            picked = pick_features(given, places[name])
            embeds = torch.where(places[name].unsqueeze(-1), picked, embeds)
        slots = {name: _max_per_row(given, tokens) for name, given in present.items()}
        return _Sequence(mask, input_pos, embeds, slots, places, state=state)

    def _count(
        self,
        model: StrategyModel,
        tokens: Tensor,
        places: Mapping[str, Tensor],
        input_pos: Tensor | None,
    ) -> tuple[Tensor | None, CacheState | None]:
        """Positions by modality, and with caches the counts from which later calls continue."""
        earlier: Mapping[str, Tensor] | None = None
        if cached := model.caches_are_enabled():
            earlier = {} if model.cache_state is None else model.cache_state.num_tokens
        if not places and not earlier:
            return input_pos, None
        if input_pos is None:
            input_pos = torch.arange(tokens.shape[1], device=tokens.device)
        input_pos = by_row(input_pos, *tokens.shape)
        # Features of earlier calls shift the positions of text, also in a call without features.
        none = torch.zeros_like(tokens, dtype=torch.bool)
        everywhere = {name: places.get(name, none) for name in {**(earlier or {}), **places}}
        positions, counts = positions_by_modality(everywhere, input_pos, earlier)
        return positions, CacheState(num_tokens=counts) if cached and places else None

    def _prepend(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        mask: Tensor | None,
        input_pos: Tensor | None,
        document_ids: Tensor | None,
    ) -> _Sequence:
        """Put features in front of the text."""
        check_rows(tokens, features)
        if document_ids is not None:
            check_documents(features)
        present = {name: given for name, given in features.items() if given.present}
        cached = model.caches_are_enabled()
        earlier = model.cache_state if cached else None
        if present and earlier is not None:
            raise ModelError(
                "The caches hold a sequence already, and a prefix can only be its start. Call "
                'reset_caches() first, or fuse with placement="placeholder" for images in later turns.'
            )
        if not present:
            if not cached:
                return _Sequence(mask, input_pos)
            if earlier is None:
                return _Sequence(mask, input_pos, state=Prefix.from_features(tokens, ()).to_cache())
            assert mask is not None
            assert input_pos is not None
            prefix = Prefix.from_cache(earlier, tokens)
            if not self.counts_by_modality:
                input_pos = prefix.text_positions(input_pos)
            return _Sequence(prefix.text_mask(mask)[..., : mask.shape[-1]], input_pos)
        prefix = Prefix.from_features(tokens, list(present.values()), document_ids)
        slots = {name: given.embeds.shape[1] for name, given in present.items()}
        is_causal = mask is None and all(given.mask is None for given in present.values())
        if self.counts_by_modality:
            input_pos = prefix.positions_by_modality(input_pos, list(slots.values()))
        elif not is_causal or input_pos is not None:
            input_pos = prefix.full_positions(input_pos)
        if not is_causal:
            mask = prefix.full_mask(mask, slots=mask.shape[-1] if cached and mask is not None else None)
            mask = mask if document_ids is None else with_block_kernel(mask)
        embeds = [*(given.embeds for given in present.values()), model.tok_embeddings(tokens)]
        valid = prefix.valid.split(list(slots.values()), dim=1)
        by_name = {n: v for n, v in zip(slots, valid, strict=True) if present[n].mask is not None}
        state = prefix.to_cache() if cached else None
        return _Sequence(mask, input_pos, torch.cat(embeds, dim=1), slots, valid=by_name, state=state)


def _max_per_row(given: EncoderFeatures, tokens: Tensor) -> int:
    """The largest number of features that a row can have."""
    num = given.embeds.shape[:2].numel() if is_flat(given.embeds, tokens) else given.embeds.shape[1]
    return min(num, tokens.shape[1])
