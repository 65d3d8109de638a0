"""Features added to the hidden states at their positions, after several early layers.

DeepStack (https://arxiv.org/abs/2406.04334), as in Qwen3-VL: features enter a decoder not only as its
first hidden states; after chosen early layers, a map for each layer adds them to the hidden states at
their positions. The maps are initialized to zero, so that the first output is that of the decoder
without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.modules.experts.routing import Routing, keep_in_graph
from torchfuse.modules.fusion_wrapper import FusionWrapper
from torchfuse.naming import unwrap

__all__ = ["DeepStackLayer", "FeatureMap"]


class FeatureMap(nn.Module):
    """From features to what is added to hidden states: two linear maps, the last of which is zero.

    Args:
        dim: width of features and hidden states.
        hidden_dim: width between the maps.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.activation = nn.GELU()
        self.w2 = nn.Linear(hidden_dim, dim)
        nn.init.zeros_(self.w2.weight)
        nn.init.zeros_(self.w2.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[b, n, d]`` to ``[b, n, d]``."""
        return self.w2(self.activation(self.w1(features)))


class DeepStackLayer(FusionWrapper):
    """A pretrained decoder layer after which features are added at their positions.

    Names are the pretrained layer's (see ``torchfuse.naming.TransparentWrapper``); new parameters are
    under ``fusion_layer.<modality>.`` and are what ``fusion_params`` names.

    Args:
        layer: the pretrained layer, called as ``layer(x, **kwargs)``.
        modalities: names of the modalities other than text.
        dim: width of the decoder.
        hidden_dim: width inside the maps; ``dim`` unless given.

    Raises:
        ModelError: if there is no modality, or a name of the layer would be hidden.
    """

    fusion_layer: nn.ModuleDict

    def __init__(
        self, layer: nn.Module, modalities: Sequence[str], dim: int, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        if not modalities:
            raise ModelError("A DeepStackLayer needs the name of a modality, got none.")
        weight = next(p for p in layer.parameters() if p.is_floating_point())
        with weight.device:
            maps = {name: FeatureMap(dim, hidden_dim or dim) for name in modalities}
        self.fusion_layer = nn.ModuleDict(maps).to(weight.dtype)
        self.wrap(layer, child="layer")

    def forward(self, x: Tensor, *, routing: Routing | None = None, **kwargs: Any) -> Tensor:
        """Run the layer, and add the features of the sequence to its hidden states.

        Args:
            x: hidden states, ``[b, t, d]``.
            routing: which tokens are of which modality, with their features. None: all are text.
            **kwargs: passed to the layer.

        Returns:
            Hidden states, ``[b, t, d]``.
        """
        if routing is None:
            return self.wrapped(x, **kwargs)
        # Activation checkpointing around the pretrained layer alone is meant for all that runs here.
        checkpoint = getattr(self.wrapped, "checkpoint_fn", None)
        if checkpoint is not None:
            return checkpoint(self._run, x, routing, **kwargs)
        return self._run(x, routing, **kwargs)

    def _run(self, x: Tensor, routing: Routing, **kwargs: Any) -> Tensor:
        h = unwrap(self.wrapped)(x, **kwargs)
        if routing.slots:
            parts = {
                name: routing.take(name, h) + self.fusion_layer[name](routing.features[name])
                for name in routing.slots
            }
            h = routing.merge(routing.text(h), parts)
        for name, stand_in in routing.stand_ins.items():
            h = keep_in_graph(h, self.fusion_layer[name](stand_in))
        return h

    def setup_caches(self, batch_size: int, dtype: torch.dtype, **lengths: int | None) -> None:
        """Set up the pretrained layer's key-value cache; features are added once, to the prompt."""
        layer: Any = self.wrapped
        layer.setup_caches(batch_size, dtype, **lengths)
