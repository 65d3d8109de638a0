"""DeepStack: features are part of the sequence, and are added to it again after early layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.models.strategies.fused_layers import fuse_layers
from torchfuse.models.strategies.routed_layers import RoutedLayersStrategy
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.modules.deepstack import DeepStackLayer

__all__ = ["DeepStackStrategy"]

_EARLY: Final = 3  # as in Qwen3-VL


@register_modality_strategy("deepstack")
@dataclass(frozen=True)
class DeepStackStrategy(RoutedLayersStrategy):
    """Features are also added to the hidden states of their positions, after early layers.

    See ``torchfuse.modules.deepstack``. Before its first step the model equals that of
    ``joint_decoder``.

    Args:
        placement: ``"prefix"``: features in front of the text; ``"placeholder"``: in place of the
            encoder's token. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``.
        encoder_token: id of the placeholder, ``{name: id}`` for named encoders.
        layers: indices of the decoder layers after which features are added. None: every k-th, if
            ``fuse`` is given ``every``; else the first three, or all but the last if those are fewer.
        hidden_dim: width inside the maps that add them. None: the decoder's.

    Raises:
        ConfigError: if an option is out of its range, or the last layer is named with ``"prefix"``.
    """

    routes_features: ClassVar[bool] = True
    layer_type: ClassVar[type[nn.Module]] = DeepStackLayer

    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ConfigError(f"hidden_dim must be at least 1, got {self.hidden_dim}.")

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        layers: Any = decoder.layers
        embedding: Any = decoder.tok_embeddings
        strategy = self
        if self.layers is None and every is None:
            strategy = replace(self, layers=range(max(1, min(_EARLY, len(layers) - 1))))
        return fuse_layers(
            layers,
            strategy.layers_with_gradient(decoder, every),
            lambda i: DeepStackLayer(layers[i], encoders, embedding.embedding_dim, self.hidden_dim),
        )
