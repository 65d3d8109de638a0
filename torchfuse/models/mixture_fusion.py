"""Features stand in the sequence, and fused layers of the decoder know which tokens they are.

That is common to all architectures with weights of their own in the layers. The first of them is
Mixture-of-Transformers: the pretrained layers are the text's weights, see
``torchfuse.modules.mixture_of_transformers``. Text keeps the positions that it has without the other
modalities, and each of those counts its own, so that text alone is scored as by the decoder, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchfuse.models.base import FusedModel
from torchfuse.models.fused_layers import fuse_layers, layers_to_fuse
from torchfuse.models.sequence import Placement, SequenceStrategy
from torchfuse.models.strategies import ModalityContext, register_modality_strategy
from torchfuse.modules.mixture_of_transformers import MoTLayer, MoTNorm, Start
from torchfuse.naming import unwrap

__all__ = ["LayerStrategy", "MixtureFusionModel", "MoTStrategy"]


@dataclass(frozen=True)
class LayerStrategy(SequenceStrategy):
    """Features stand in the sequence, and fused layers are told where.

    Args:
        placement: ``"prefix"``: features stand in front of the text; ``"placeholder"``: in place of the
            encoder's token.
        encoder_token: see ``SequenceStrategy``.
        layers: which decoder layers are fused, counted from 0. None: every k-th, as ``fuse`` is told.
    """

    routes_tokens: ClassVar[bool] = True

    layer_type: ClassVar[type[nn.Module]]
    """The class of fused layers."""

    placement: Placement = "prefix"
    layers: Sequence[int] | None = None

    def modalities_of(self, layer: Any) -> list[str]:
        """The modalities for which a fused layer has weights."""
        return list(layer.fusion_layer)

    def fused_layers(self, decoder: Any) -> dict[int, Any]:
        """The fused layers of a decoder, by their indices."""
        layers = [unwrap(layer) for layer in getattr(decoder, "layers", ())]
        return {i: layer for i, layer in enumerate(layers) if isinstance(layer, self.layer_type)}

    def layers_that_are_read(self, decoder: Any, every: int | None) -> list[int]:
        """Which layers to fuse where weights make nothing of features but their hidden states.

        With ``placement="prefix"`` nobody reads those behind the last layer: weights there would never
        get a gradient. Counted by ``every``, that layer is left out.

        Args:
            decoder: a pretrained decoder.
            every: as in ``layers_to_fuse``.

        Raises:
            ValueError: as ``layers_to_fuse``; also if that layer is named, or no other would be fused.
        """
        last = len(decoder.layers) - 1
        indices = layers_to_fuse(last + 1, self.layers, every)
        if self.placement == "placeholder" or last not in indices:
            return indices
        if self.layers is not None or indices == [last]:
            raise ValueError(
                f"Layer {last} is the last: where features stand in front of the text, nobody reads "
                f"what new weights would make of them there. Fuse layers before it (now {indices}), or "
                'choose placement="placeholder".'
            )
        return indices[:-1]

    def decoder_faults(self, decoder: Any, encoders: Sequence[str]) -> list[str]:
        """What a decoder lacks of what ``plan`` would have put in place, in words."""
        fused = self.fused_layers(decoder)
        faults = [] if fused else [f"no layer is a {self.layer_type.__name__}"]
        for index, layer in fused.items():
            faults += _misfit(f"layer {index}", self.modalities_of(layer), encoders)
        return faults

    def check_decoder(self, decoder: Any, encoders: Sequence[str]) -> None:
        if faults := self.decoder_faults(decoder, encoders):
            raise ValueError(
                f"This decoder is not fused for placement={self.placement!r}: {'; '.join(faults)}. "
                f'torchfuse.fuse(decoder, encoder, arch="{self.arch}") puts in place what is needed.'
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

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        return {**self.options(), "layers": list(self.fused_layers(decoder))}


@register_modality_strategy("mot")
@dataclass(frozen=True)
class MoTStrategy(LayerStrategy):
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

    counts_by_modality: ClassVar[bool] = True
    layer_type: ClassVar[type[nn.Module]] = MoTLayer

    start: Start = "warm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("warm", "zero"):
            raise ValueError(f'start must be "warm" or "zero", got {self.start!r}.')

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
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

    def decoder_faults(self, decoder: Any, encoders: Sequence[str]) -> list[str]:
        faults, fused = super().decoder_faults(decoder, encoders), self.fused_layers(decoder)
        scores_features = self.placement == "placeholder"
        if scores_features:
            norm = unwrap(decoder.norm) if hasattr(decoder, "norm") else None
            if isinstance(norm, MoTNorm):
                faults += _misfit("the final norm", list(norm.fusion_layer), encoders)
            else:
                faults.append("the final norm is no MoTNorm")
        return faults + [
            f"layer {index} has keys and values only, but what it returns is read"
            for index, layer in fused.items()
            if layer.keys_and_values_only and (scores_features or index < len(decoder.layers) - 1)
        ]

    def options(self) -> dict[str, Any]:
        options = super().options()
        del options["start"]  # how weights began is nothing that they must have in common
        return options


def _misfit(what: str, there: Sequence[str], encoders: Sequence[str]) -> list[str]:
    if set(there) == set(encoders):
        return []
    return [f"{what} has weights for {', '.join(there) or 'nobody'}, not for {', '.join(encoders)}"]


class MixtureFusionModel(FusedModel):
    """A decoder in whose sequence features stand, with weights of their own; ``fuse`` builds one.

    Arguments are those of ``FusedModel``.
    """

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        for layer in self.layers:  # a layer that refuses does so before any has a cache
            refuse = getattr(unwrap(layer), "check_caches", None)
            if refuse is not None:
                refuse()
        super().setup_caches(
            batch_size,
            dtype,
            encoder_max_seq_len=encoder_max_seq_len,
            decoder_max_seq_len=decoder_max_seq_len,
        )

    def _unembed(self, h: Tensor, context: ModalityContext) -> Any:
        norm: Any = self.norm
        if context.routing is None or not isinstance(unwrap(norm), MoTNorm):
            return super()._unembed(h, context)
        h = norm(h, routing=context.routing)
        # The rest of the decoder's own unembed.
        return self.chunked_output(h) if self.num_output_chunks > 0 else self.output(h).float()
