"""Features in the sequence, and fused layers that get the modality of each token.

This is what ``mot``, ``moma`` and ``deepstack`` share: new weights inside decoder layers, for features
alone. Text without features is scored as by the decoder, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.strategies.fused_layers import layers_to_fuse
from torchfuse.models.strategies.sequence import SequenceStrategy
from torchfuse.models.types import ModalityContext
from torchfuse.modules.experts.mixture_of_transformers import MoTNorm
from torchfuse.naming import unwrap

__all__ = ["MixtureFusionModel", "RoutedLayersStrategy", "modality_problems"]


class MixtureFusionModel(FusedModel):
    """A decoder with features in its sequence and new weights for them in its layers.

    ``fuse`` builds one. Arguments are those of ``FusedModel``.
    """

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        for layer in self.layers:  # a layer that cannot have a cache raises before any layer has one
            check = getattr(unwrap(layer), "check_caches", None)
            if check is not None:
                check()
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
        # The rest of TransformerDecoder.unembed.
        return self.chunked_output(h) if self.num_output_chunks > 0 else self.output(h).float()


@dataclass(frozen=True)
class RoutedLayersStrategy(SequenceStrategy):
    """Features are part of the sequence, and fused layers get the modality of each token.

    Args:
        placement: see ``SequenceStrategy``.
        encoder_token: see ``SequenceStrategy``.
        layers: indices of the decoder layers to fuse. None: every k-th, by the ``every`` of ``fuse``.
    """

    routes_tokens: ClassVar[bool] = True

    model_class = MixtureFusionModel

    layer_type: ClassVar[type[nn.Module]]
    """The class of fused layers."""

    layers: Sequence[int] | None = None

    def modalities_of(self, layer: Any) -> list[str]:
        """Return the modalities for which a fused layer has weights."""
        return list(layer.fusion_layer)

    def fused_layers(self, decoder: Any) -> dict[int, Any]:
        """Return the fused layers of a decoder by index."""
        layers = [unwrap(layer) for layer in getattr(decoder, "layers", ())]
        return {i: layer for i, layer in enumerate(layers) if isinstance(layer, self.layer_type)}

    def layers_with_gradient(self, decoder: Any, every: int | None) -> list[int]:
        """Choose the layers to fuse, for weights that act on hidden states of features alone.

        With ``placement="prefix"`` hidden states of features after the last layer are unused, and
        weights there would never get a gradient. Chosen by ``every``, that layer is left out.

        Args:
            decoder: a pretrained decoder.
            every: as in ``layers_to_fuse``.

        Raises:
            ConfigError: as ``layers_to_fuse``; also if that layer is named, or no other would be fused.
        """
        last = len(decoder.layers) - 1
        indices = layers_to_fuse(last + 1, self.layers, every)
        if self.placement == "placeholder" or last not in indices:
            return indices
        if self.layers is not None or indices == [last]:
            raise ConfigError(
                f"Layer {last} is the last: with features in front of the text, its hidden states of "
                f"features are unused and new weights there would get no gradient. Fuse layers before "
                f'it (now {indices}), or choose placement="placeholder".'
            )
        return indices[:-1]

    def decoder_problems(self, decoder: Any, encoders: Sequence[str]) -> list[str]:
        """Return what a decoder lacks of what ``plan`` would have put in place."""
        fused = self.fused_layers(decoder)
        problems = [] if fused else [f"no layer is a {self.layer_type.__name__}"]
        for index, layer in fused.items():
            problems += modality_problems(f"layer {index}", self.modalities_of(layer), encoders)
        return problems

    def check_decoder(self, decoder: Any, encoders: Sequence[str]) -> None:
        if problems := self.decoder_problems(decoder, encoders):
            raise ModelError(
                f"This decoder is not fused for placement={self.placement!r}: {'; '.join(problems)}. "
                f'torchfuse.fuse(decoder, encoder, arch="{self.arch}") puts in place what is needed.'
            )

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        return {**self.options(), "layers": list(self.fused_layers(decoder))}


def modality_problems(what: str, modalities: Sequence[str], encoders: Sequence[str]) -> list[str]:
    """Compare the modalities for which there are weights with the encoders of the model."""
    if set(modalities) == set(encoders):
        return []
    has = ", ".join(modalities) or "none"
    return [f"{what} has weights for {has}, not for {', '.join(encoders)}"]
