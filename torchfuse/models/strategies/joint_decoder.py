"""Early fusion: features are part of the decoder's own sequence, like embeddings of tokens.

With a CLIP tower and a two-layer projector in place of a placeholder token this is LLaVA
(https://arxiv.org/abs/2304.08485).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.models.base import FusedModel
from torchfuse.models.encoding import encoder_names
from torchfuse.models.strategies.sequence import Placement, SequenceStrategy
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.models.types import EncoderInput, EncoderMask, ModalityContext, OnMissing

__all__ = ["EarlyFusionModel", "JointDecoderStrategy"]


class EarlyFusionModel(FusedModel):
    """A decoder with the encoder's features in its sequence.

    Signature and methods are torchtune 0.6.1's. Beyond it there are an encoder without a name, the
    prefix placement, an adapter, ``encode()`` and ``encoder_embeds=``, stand-ins for batches without
    images, and everything that a ``TransformerDecoder`` has. The decoder keeps its embeddings, so no key
    changes.

    Args:
        decoder: a ``TransformerDecoder``.
        encoders: a module that returns features ``[b, n, d_e]``, or several by name.
        encoder_tokens: the id that each encoder's features replace; None for ``placement="prefix"``.
        decoder_trainable: whether the pretrained decoder trains.
        encoders_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether fusion parameters train.
        adapter: maps features to the decoder's width. None: the encoders do.
        placement: ``"placeholder"`` or ``"prefix"``, see ``JointDecoderStrategy``.
        on_missing: see ``FusedModel``.
        example_input: see ``FusedModel``.
        strict: whether features without a placeholder, and an ``encoder_mask`` over another number of
            features than there are, are errors, as in models that ``fuse`` builds. torchtune ignores
            both.

    Raises:
        ConfigError: if the names of encoders, tokens and flags do not agree.
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
        placement: Placement | None = None,
        on_missing: OnMissing = "skip",
        example_input: EncoderInput | None = None,
        strict: bool = False,
    ) -> None:
        names = encoder_names(encoders)
        if isinstance(encoders_trainable, Mapping) and set(encoders_trainable) != set(names):
            raise ConfigError(
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
        self.strict = strict

    @classmethod
    def build(
        cls,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        strategy: Any,
        encoder_trainable: bool | Mapping[str, bool] = False,
        **options: Any,
    ) -> EarlyFusionModel:
        return cls(
            decoder,
            encoder,
            strategy.encoder_token,
            encoders_trainable=encoder_trainable,
            placement=strategy.placement,
            strict=True,
            **options,
        )

    @property
    def encoders_trainable(self) -> dict[str, bool]:
        """Whether each encoder has a parameter that trains."""
        return {
            name: any(p.requires_grad for p in self.get_encoder(name).parameters())
            for name in self.encoder_names
        }

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "decoder" and name in self._modules:
            # As in torchtune, a new decoder without embeddings gets those of the one before it.
            embeddings = self.tok_embeddings
            self._modules.pop("tok_embeddings", None)
            if not hasattr(value, "tok_embeddings"):
                self._modules["tok_embeddings"] = embeddings
        super().__setattr__(name, value)

    def _decode(self, context: ModalityContext) -> Any:
        if context.embeds is None and "tok_embeddings" in self._modules:
            context = replace(context, embeds=self.tok_embeddings(context.tokens))
        return super()._decode(context)

    def _split_mask(
        self, tokens: Tensor, encoder_mask: EncoderMask | None, embeds: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        num_features = sum(e.shape[1] for e in embeds.values())
        fits = not isinstance(encoder_mask, Tensor) or encoder_mask.shape[-1] == num_features
        return super()._split_mask(tokens, encoder_mask, embeds) if fits or self.strict else {}


@register_modality_strategy("joint_decoder")
@dataclass(frozen=True)
class JointDecoderStrategy(SequenceStrategy):
    """Features are part of the sequence, and the decoder's layers stay as they are.

    Args:
        placement: see ``SequenceStrategy``.
        encoder_token: see ``SequenceStrategy``.
    """

    model_class = EarlyFusionModel
