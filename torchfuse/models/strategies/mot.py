"""Mixture-of-Transformers: each encoder's features run through weights of their own in fused layers.

The pretrained layers are the text's weights, see ``torchfuse.modules.experts.mixture_of_transformers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.models.strategies.fused_layers import fuse_layers, layers_to_fuse
from torchfuse.models.strategies.routed_layers import RoutedLayersStrategy, modality_problems
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.modules.experts.mixture_of_transformers import MoTLayer, MoTNorm, Start
from torchfuse.naming import unwrap

__all__ = ["MoTStrategy"]


@register_modality_strategy("mot")
@dataclass(frozen=True)
class MoTStrategy(RoutedLayersStrategy):
    """Each encoder's features run through weights of their own in the fused layers.

    Layers that are not fused run the text's weights on all tokens. With ``placement="prefix"`` hidden
    states of features after the last layer of the decoder are unused, so in that layer features have
    keys and values only. With ``"placeholder"`` there is also a final norm for each encoder: the token
    after the last feature is predicted from that feature's hidden state.

    Args:
        placement: ``"prefix"``: features in front of the text; ``"placeholder"``: in place of the
            encoder's token. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``.
        encoder_token: id of the placeholder, ``{name: id}`` for named encoders. It may lie outside the
            vocabulary, and is never generated. For ``"placeholder"`` only.
        layers: indices of the decoder layers to fuse. None: every k-th, by the ``every`` of ``fuse``,
            which is 1 unless given.
        start: first values of the new weights. ``"warm"``: copies of the text's. ``"zero"``: copies too,
            except that what a layer adds to features is zero.

    Raises:
        ConfigError: if the token is missing, or given with ``"prefix"``, or ``start`` is neither.
    """

    counts_by_modality: ClassVar[bool] = True
    layer_type: ClassVar[type[nn.Module]] = MoTLayer

    start: Start = "warm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("warm", "zero"):
            raise ConfigError(f'start must be "warm" or "zero", got {self.start!r}.')

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        from torchfuse.models.layers import mot_layer  # imports torchtune

        layers: Any = decoder.layers
        scores_features = self.placement == "placeholder"

        def build(index: int) -> nn.Module:
            unused = index == len(layers) - 1 and not scores_features
            return mot_layer(layers[index], encoders, start=self.start, keys_and_values_only=unused)

        fuse = fuse_layers(layers, layers_to_fuse(len(layers), self.layers, every), build)
        norm = MoTNorm(decoder.norm, encoders) if scores_features else None  # type: ignore[arg-type]

        def put_in_place() -> None:
            fuse()
            if norm is not None:
                decoder.norm = norm

        return put_in_place

    def decoder_problems(self, decoder: Any, encoders: Sequence[str]) -> list[str]:
        problems, fused = super().decoder_problems(decoder, encoders), self.fused_layers(decoder)
        scores_features = self.placement == "placeholder"
        if scores_features:
            norm = unwrap(decoder.norm) if hasattr(decoder, "norm") else None
            if isinstance(norm, MoTNorm):
                problems += modality_problems("the final norm", list(norm.fusion_layer), encoders)
            else:
                problems.append("the final norm is no MoTNorm")
        return problems + [
            f"layer {index} has keys and values only, but its hidden states of features are used"
            for index, layer in fused.items()
            if layer.keys_and_values_only and (scores_features or index < len(decoder.layers) - 1)
        ]

    def options(self) -> dict[str, Any]:
        options = super().options()
        del options["start"]  # a model and an artifact may differ in it
        return options
