"""DeepStack: features stand in the sequence, and are added there again behind early layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.models.strategies.fused_layers import fuse_layers
from torchfuse.models.strategies.layerwise import LayerStrategy
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.modules.deepstack import DeepStackLayer

__all__ = ["DeepStackStrategy"]

_EARLY: Final = 3  # as many as Qwen3-VL has


@register_modality_strategy("deepstack")
@dataclass(frozen=True)
class DeepStackStrategy(LayerStrategy):
    """Features are added to the hidden states of their positions behind early layers, too.

    See ``torchfuse.modules.deepstack``. Before its first step the model is that of ``joint_decoder``.

    Args:
        placement: ``"prefix"``: features in front of the text; ``"placeholder"``: in place of the
            encoder's token. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``.
        encoder_token: the id in whose place features stand, ``{name: id}`` for named encoders.
        layers: behind which decoder layers features are added, counted from 0. None: every k-th, if
            ``fuse`` is told so; else the first three, or all but the last where there are fewer.
        hidden_dim: width inside the maps that add them. None: the decoder's.

    Raises:
        ModelError: if an option is out of its range, or the last layer is named with ``"prefix"``.
    """

    keeps_features: ClassVar[bool] = True
    layer_type: ClassVar[type[nn.Module]] = DeepStackLayer

    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ModelError(f"hidden_dim must be at least 1, got {self.hidden_dim}.")

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        layers: Any = decoder.layers
        embedding: Any = decoder.tok_embeddings
        chosen = self
        if self.layers is None and every is None:
            chosen = replace(self, layers=range(max(1, min(_EARLY, len(layers) - 1))))
        return fuse_layers(
            layers,
            chosen.layers_that_are_read(decoder, every),
            lambda i: DeepStackLayer(layers[i], encoders, embedding.embedding_dim, self.hidden_dim),
        )
