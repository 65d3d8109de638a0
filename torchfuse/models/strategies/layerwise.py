"""Features stand in the sequence, and fused layers of the decoder know which tokens they are.

That is common to all architectures with weights of their own in the layers. Text alone is scored as by
the decoder, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.strategies.fused_layers import layers_to_fuse
from torchfuse.models.strategies.sequence import SequenceStrategy
from torchfuse.models.types import ModalityContext
from torchfuse.modules.experts.mixture_of_transformers import MoTNorm
from torchfuse.naming import unwrap

__all__ = ["LayerStrategy", "MixtureFusionModel", "misfit"]


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


@dataclass(frozen=True)
class LayerStrategy(SequenceStrategy):
    """Features stand in the sequence, and fused layers are told where.

    Args:
        placement: see ``SequenceStrategy``.
        encoder_token: see ``SequenceStrategy``.
        layers: which decoder layers are fused, counted from 0. None: every k-th, as ``fuse`` is told.
    """

    routes_tokens: ClassVar[bool] = True

    model_class = MixtureFusionModel

    layer_type: ClassVar[type[nn.Module]]
    """The class of fused layers."""

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
            ModelError: as ``layers_to_fuse``; also if that layer is named, or no other would be fused.
        """
        last = len(decoder.layers) - 1
        indices = layers_to_fuse(last + 1, self.layers, every)
        if self.placement == "placeholder" or last not in indices:
            return indices
        if self.layers is not None or indices == [last]:
            raise ModelError(
                f"Layer {last} is the last: where features stand in front of the text, nobody reads "
                f"what new weights would make of them there. Fuse layers before it (now {indices}), or "
                'choose placement="placeholder".'
            )
        return indices[:-1]

    def decoder_problems(self, decoder: Any, encoders: Sequence[str]) -> list[str]:
        """What a decoder lacks of what ``plan`` would have put in place, in words."""
        fused = self.fused_layers(decoder)
        problems = [] if fused else [f"no layer is a {self.layer_type.__name__}"]
        for index, layer in fused.items():
            problems += misfit(f"layer {index}", self.modalities_of(layer), encoders)
        return problems

    def check_decoder(self, decoder: Any, encoders: Sequence[str]) -> None:
        if problems := self.decoder_problems(decoder, encoders):
            raise ModelError(
                f"This decoder is not fused for placement={self.placement!r}: {'; '.join(problems)}. "
                f'torchfuse.fuse(decoder, encoder, arch="{self.arch}") puts in place what is needed.'
            )

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        return {**self.options(), "layers": list(self.fused_layers(decoder))}


def misfit(what: str, there: Sequence[str], encoders: Sequence[str]) -> list[str]:
    """What is wrong where weights are for other encoders than the model has, in words."""
    if set(there) == set(encoders):
        return []
    return [f"{what} has weights for {', '.join(there) or 'nobody'}, not for {', '.join(encoders)}"]
