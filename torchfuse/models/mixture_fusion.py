"""Mixture-of-Transformers: features stand in the sequence, and have weights of their own in its layers.

The pretrained layers are the text's weights, see ``torchfuse.modules.mixture_of_transformers``. Text
keeps the positions that it has without the other modalities, and each of those counts its own, so that
text alone is scored as by the decoder, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from torchfuse.models.base import FusedModel
from torchfuse.models.encoding import EncoderInput, OnMissing, encoder_names
from torchfuse.models.sequence import Placement, SequenceStrategy
from torchfuse.models.strategies import (
    ModalityContext,
    fuse_layers,
    layers_to_fuse,
    register_modality_strategy,
)
from torchfuse.modules.mixture_of_transformers import MoTLayer, MoTNorm, Start
from torchfuse.naming import unwrap

__all__ = ["MixtureFusionModel", "MoTStrategy"]


@register_modality_strategy("mot")
@dataclass(frozen=True)
class MoTStrategy(SequenceStrategy):
    """Each encoder's features run through weights of their own in the fused layers.

    Layers that are not fused run the text's weights on all tokens. With ``placement="prefix"`` nobody
    reads what the last layer of the decoder makes of features, so there they have keys and values only.
    With ``"placeholder"`` the final norm is one for each encoder, too: what comes behind the last
    feature is scored by its hidden state.

    Args:
        placement: ``"prefix"``: features stand in front of the text; ``"placeholder"``: in place of the
            encoder's token.
        encoder_token: the id in whose place features stand, ``{name: id}`` for named encoders. It may
            lie outside the vocabulary, and is never generated. For ``"placeholder"`` only.
        layers: which decoder layers are fused, counted from 0. None: every k-th, as ``fuse`` is told,
            which is all of them unless it is.
        start: first values of the new weights. ``"warm"``: copies of the text's. ``"zero"``: copies too,
            but what a layer adds to features is nothing.

    Raises:
        ValueError: if the token is missing, or given with ``"prefix"``, or ``start`` is neither.
    """

    default_every: ClassVar[int] = 1
    routes_tokens: ClassVar[bool] = True
    counts_by_modality: ClassVar[bool] = True

    placement: Placement = "prefix"
    layers: Sequence[int] | None = None
    start: Start = "warm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("warm", "zero"):
            raise ValueError(f'start must be "warm" or "zero", got {self.start!r}.')

    def plan(self, decoder: nn.Module, encoders: Sequence[str], *, every: int) -> Callable[[], None]:
        from torchfuse.models.layers import mot_layer  # imports torchtune

        layers: Any = decoder.layers
        scores_features = self.placement == "placeholder"

        def build(index: int) -> nn.Module:
            unread = index == len(layers) - 1 and not scores_features
            return mot_layer(layers[index], encoders, start=self.start, keys_and_values_only=unread)

        fuse = fuse_layers(layers, layers_to_fuse(len(layers), self.layers, every), build)
        norm = MoTNorm(decoder.norm, encoders) if scores_features else None  # type: ignore[arg-type]

        def put_in_place() -> None:
            fuse()
            if norm is not None:
                decoder.norm = norm

        return put_in_place

    def check_decoder(self, decoder: Any, encoders: Sequence[str]) -> None:
        layers = [unwrap(layer) for layer in getattr(decoder, "layers", ())]
        fused = {i: layer for i, layer in enumerate(layers) if isinstance(layer, MoTLayer)}
        faults = [] if fused else ["no layer is a MoTLayer"]
        parts: dict[str, Any] = {f"layer {index}": layer for index, layer in fused.items()}
        if self.placement == "placeholder":
            norm = unwrap(decoder.norm) if hasattr(decoder, "norm") else None
            faults += [] if isinstance(norm, MoTNorm) else ["the final norm is no MoTNorm"]
            parts |= {"the final norm": norm} if isinstance(norm, MoTNorm) else {}
        for what, part in parts.items():
            if set(part.fusion_layer) != set(encoders):
                there = ", ".join(part.fusion_layer) or "nobody"
                faults.append(f"{what} has weights for {there}, not for {', '.join(encoders)}")
        read = [i for i in fused if self.placement == "placeholder" or i < len(layers) - 1]
        for index in read:
            if fused[index].keys_and_values_only:
                faults.append(f"layer {index} has keys and values only, but what it returns is read")
        if faults:
            raise ValueError(
                f"This decoder is not fused for placement={self.placement!r}: {'; '.join(faults)}. "
                'torchfuse.fuse(decoder, encoder, arch="mot") puts in place what is needed.'
            )

    def wrap(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        adapter: nn.Module | Mapping[str, nn.Module] | None,
        **flags: Any,
    ) -> MixtureFusionModel:
        return MixtureFusionModel(decoder, encoder, strategy=self, adapter=adapter, **flags)

    def options(self) -> dict[str, Any]:
        options = super().options()
        del options["start"]  # how weights began is nothing that they must have in common
        return options

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        layers: Any = decoder.layers
        fused = [i for i, layer in enumerate(layers) if isinstance(unwrap(layer), MoTLayer)]
        return {**self.options(), "layers": fused}


class MixtureFusionModel(FusedModel):
    """A decoder in whose sequence features stand, with weights of their own; ``fuse`` builds one.

    Args:
        decoder: a ``TransformerDecoder`` with the layers in it that the strategy wants.
        encoder: a module that returns features ``[b, n, d_e]``, or several by name.
        strategy: the architecture's options.
        adapter: what maps features to the decoder's width. None: the encoders do.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether what fusion added trains.
        on_missing: see ``FusedModel``.
        example_input: see ``FusedModel``.

    Raises:
        ValueError: if no layer is fused, or the weights in the decoder are not those that the encoders
            and the placement need.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        strategy: SequenceStrategy,
        adapter: nn.Module | Mapping[str, nn.Module] | None = None,
        decoder_trainable: bool = False,
        encoder_trainable: bool | Mapping[str, bool] = False,
        fusion_trainable: bool = True,
        on_missing: OnMissing = "skip",
        example_input: EncoderInput | None = None,
    ) -> None:
        strategy.check_decoder(decoder, encoder_names(encoder))
        super().__init__(
            decoder,
            encoder,
            strategy=strategy,
            adapter=adapter,
            decoder_trainable=decoder_trainable,
            encoder_trainable=encoder_trainable,
            fusion_trainable=fusion_trainable,
            on_missing=on_missing,
            example_input=example_input,
        )

    def _unembed(self, h: Tensor, context: ModalityContext) -> Any:
        norm: Any = self.norm
        if context.routing is None or not isinstance(unwrap(norm), MoTNorm):
            return super()._unembed(h, context)
        h = norm(h, routing=context.routing)
        # The rest of the decoder's own unembed.
        return self.chunked_output(h) if self.num_output_chunks > 0 else self.output(h).float()
