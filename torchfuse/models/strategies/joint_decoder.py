"""Early fusion: features stand in the decoder's own sequence, as if they were tokens.

With a CLIP tower and a two-layer projector in place of a special token this is LLaVA
(https://arxiv.org/abs/2304.08485).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.strategies.sequence import Placement, SequenceStrategy
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.models.types import EncoderInput, EncoderMask, ModalityContext, OnMissing

__all__ = ["EarlyFusionModel", "JointDecoderStrategy"]


@register_modality_strategy("joint_decoder")
@dataclass(frozen=True)
class JointDecoderStrategy(SequenceStrategy):
    """Features stand in the sequence of a decoder whose layers are as they were.

    Args:
        placement: see ``SequenceStrategy``.
        encoder_token: see ``SequenceStrategy``.
    """

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
            decoder,
            encoder,
            self.encoder_token,
            adapter=adapter,
            placement=self.placement,
            strict=True,
            **flags,
        )


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
        strict: whether features that no token takes, and an ``encoder_mask`` over another number of
            features than there are, are errors, as in models that ``fuse`` builds. torchtune ignores
            both.

    Raises:
        ModelError: if the names of encoders, tokens and flags do not agree.
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
        if isinstance(encoders_trainable, Mapping):
            names = list(encoders) if isinstance(encoders, Mapping) else ["encoder"]
            if set(encoders_trainable) != set(names):
                raise ModelError(
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "decoder" and name in self._modules:
            # As with torchtune, a decoder without embeddings gets those of the one before it.
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
        ignored = isinstance(encoder_mask, Tensor) and encoder_mask.shape[-1] != num_features
        if ignored and not self.strict:
            return {}
        return super()._split_mask(tokens, encoder_mask, embeds)

    @property
    def encoders_trainable(self) -> dict[str, bool]:
        """Whether each encoder has a parameter that trains."""
        return {
            name: any(p.requires_grad for p in self.get_encoder(name).parameters())
            for name in self.encoder_names
        }
