"""Early fusion: features stand in the decoder's own sequence, as if they were tokens.

``placeholder``: features replace the embeddings of the encoder's special token, row by row; the
sequence keeps its length and its positions. ``prefix``: features stand in front of the text and are
cut off again before the head; the tokens stay as they are. With a CLIP tower and a two-layer
projector the first is LLaVA (https://arxiv.org/abs/2304.08485).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchfuse.models.base import FusedModel
from torchfuse.models.encoding import EncoderInput, OnMissing
from torchfuse.models.placement import Prefix, check_counts, is_flat, pick_features
from torchfuse.models.strategies import (
    EncoderFeatures,
    ModalityContext,
    ModalityStrategy,
    check_rows,
    register_modality_strategy,
)
from torchfuse.modules.routing import take_part

__all__ = ["EarlyFusionModel", "JointDecoderStrategy"]

Placement = Literal["placeholder", "prefix"]


@register_modality_strategy("joint_decoder")
@dataclass(frozen=True)
class JointDecoderStrategy(ModalityStrategy):
    """Features stand in the decoder's sequence.

    Args:
        placement: ``"placeholder"``: in place of the encoder's token; ``"prefix"``: in front.
        encoder_token: the id whose embeddings are replaced, ``{name: id}`` for named encoders. It may
            lie outside the vocabulary, and is never generated. For ``"placeholder"`` only.

    With ``"placeholder"`` an encoder mask says which features belong to a row, and nothing else: the
    features are part of the sequence, where ``mask`` says what may attend to what.

    Raises:
        ValueError: if the token is missing, or given with ``"prefix"``.
    """

    placement: Placement = "placeholder"
    encoder_token: int | Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.placement not in ("placeholder", "prefix"):
            raise ValueError(f'placement must be "placeholder" or "prefix", got {self.placement!r}.')
        if (self.placement == "placeholder") != (self.encoder_token is not None):
            raise ValueError(
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
                raise ValueError(
                    f"Encoder tokens must have the names of the encoders, {', '.join(names)}; got "
                    f"{', '.join(self.encoder_token) or 'none'}."
                )
            if len(set(self.encoder_token.values())) != len(self.encoder_token):
                raise ValueError(f"Encoders cannot share a token, got {dict(self.encoder_token)}.")
        elif self.encoder_token is not None and len(names) > 1:
            raise ValueError(
                f"The encoders {', '.join(names)} need a token each: encoder_token={{name: id}}."
            )

    def prepare(
        self,
        model: FusedModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        *,
        mask: Tensor | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        input_pos: Tensor | None,
    ) -> ModalityContext:
        if self.placement == "placeholder":
            return self._replace(model, tokens, features, mask, input_pos)
        return self._prepend(model, tokens, features, mask, input_pos)

    def wrap(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        adapter: nn.Module | Mapping[str, nn.Module] | None,
        **flags: Any,
    ) -> EarlyFusionModel:
        flags["encoders_trainable"] = flags.pop("encoder_trainable", False)
        return EarlyFusionModel(
            decoder, encoder, self.encoder_token, adapter=adapter, placement=self.placement, **flags
        )

    def _token(self, name: str) -> int:
        assert self.encoder_token is not None
        return self.encoder_token if isinstance(self.encoder_token, int) else self.encoder_token[name]

    def _replace(
        self,
        model: FusedModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        mask: Tensor | None,
        input_pos: Tensor | None,
    ) -> ModalityContext:
        places = {name: tokens == self._token(name) for name in model.encoder_names}
        for name, place in places.items():
            given = features.get(name)
            if given is not None and given.mask is not None and is_flat(given.embeds, tokens):
                raise ValueError(
                    f"The features of {name!r} have {given.embeds.shape[0]} rows, the tokens "
                    f"{tokens.shape[0]}, so an encoder_mask cannot say which belong to a row. Give "
                    "features row by row, or no mask."
                )
            check_counts(name, self._token(name), place, given)
        if not features:
            return ModalityContext(tokens, mask=mask, input_pos=input_pos)
        # A special token may lie outside the table: look up any row, it is replaced.
        anywhere = torch.stack(list(places.values())).any(dim=0)
        embeds = model.tok_embeddings(tokens.masked_fill(anywhere, 0))
        for name, given in features.items():
            if given.present:
                place = places[name]
                embeds = torch.where(place.unsqueeze(-1), pick_features(given, place), embeds)
            else:
                embeds = take_part(embeds, given.embeds)
        return ModalityContext(tokens, embeds, mask=mask, input_pos=input_pos)

    def _prepend(
        self,
        model: FusedModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        mask: Tensor | None,
        input_pos: Tensor | None,
    ) -> ModalityContext:
        check_rows(tokens, features)
        present = [given for given in features.values() if given.present]
        stand_ins = [given.embeds for given in features.values() if not given.present]
        cached = model.caches_are_enabled()
        earlier: Prefix | None = model.cache_state if cached else None
        if present and earlier is not None:
            raise ValueError(
                "The caches hold a sequence already, and features can only stand in front of one. Call "
                'reset_caches() first, or fuse with placement="placeholder" for images in later turns.'
            )
        if not present:
            if earlier is not None:
                assert mask is not None
                assert input_pos is not None
                prefix = earlier.seen_by(tokens)
                mask = prefix.text_mask(mask)[..., : mask.shape[-1]]
                input_pos = prefix.text_positions(input_pos)
            elif cached:
                model.cache_state = Prefix.of_features(tokens, ()).last()
            if not stand_ins:
                return ModalityContext(tokens, mask=mask, input_pos=input_pos)
            embeds = model.tok_embeddings(tokens)
        else:
            prefix = Prefix.of_features(tokens, present)
            plain = mask is None and input_pos is None and all(g.mask is None for g in present)
            if not plain:  # otherwise causal and counted from zero, which is what None means
                slots = mask.shape[-1] if cached and mask is not None else None
                mask = prefix.full_mask(mask, slots=slots)
                input_pos = prefix.full_positions(input_pos)
            if cached:
                model.cache_state = prefix.last()
            embeds = torch.cat([*(g.embeds for g in present), model.tok_embeddings(tokens)], dim=1)
        for stand_in in stand_ins:
            embeds = take_part(embeds, stand_in)
        text = slice(embeds.shape[1] - tokens.shape[1], None)
        return ModalityContext(tokens, embeds, mask=mask, input_pos=input_pos, output_slice=text)


class EarlyFusionModel(FusedModel):
    """A decoder in whose sequence the encoder's features stand.

    Signature and methods are torchtune 0.6.1's; more than it had: counts of tokens and features that
    are checked, an encoder without a name, the prefix placement, an adapter, ``encode()`` and
    ``encoder_embeds=``, stand-ins for batches without images, and everything that a
    ``TransformerDecoder`` has. The decoder keeps its embeddings, so no key moves.

    Args:
        decoder: a ``TransformerDecoder``.
        encoders: a module that returns features ``[b, n, d_e]``, or several by name.
        encoder_tokens: the id that each encoder's features replace; None for ``placement="prefix"``.
        decoder_trainable: whether the pretrained decoder trains.
        encoders_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether what fusion added trains.
        adapter: what maps features to the decoder's width. None: the encoders do.
        placement: ``"placeholder"`` or ``"prefix"``, see ``JointDecoderStrategy``.
        on_missing: see ``FusedModel``.
        example_input: see ``FusedModel``.

    Raises:
        ValueError: if the names of encoders, tokens and flags do not agree.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoders: nn.Module | Mapping[str, nn.Module],
        encoder_tokens: int | Mapping[str, int] | None,
        decoder_trainable: bool = False,
        encoders_trainable: bool | Mapping[str, bool] = False,
        fusion_trainable: bool = True,
        *,
        adapter: nn.Module | Mapping[str, nn.Module] | None = None,
        placement: Placement = "placeholder",
        on_missing: OnMissing = "skip",
        example_input: EncoderInput | None = None,
    ) -> None:
        if isinstance(encoders_trainable, Mapping):
            names = list(encoders) if isinstance(encoders, Mapping) else ["encoder"]
            if set(encoders_trainable) != set(names):
                raise ValueError(
                    f"encoders_trainable must have the names of the encoders, {', '.join(names)}; got "
                    f"{', '.join(encoders_trainable) or 'none'}."
                )
        super().__init__(
            decoder,
            encoders,
            strategy=JointDecoderStrategy(placement=placement, encoder_token=encoder_tokens),
            adapter=adapter,
            decoder_trainable=decoder_trainable,
            encoder_trainable=encoders_trainable,
            fusion_trainable=fusion_trainable,
            on_missing=on_missing,
            example_input=example_input,
        )
        self.encoder_tokens = encoder_tokens

    @property
    def encoders_trainable(self) -> dict[str, bool]:
        """Whether each encoder has a parameter that trains."""
        return {
            name: any(p.requires_grad for p in self.get_encoder(name).parameters())
            for name in self.encoder_names
        }
