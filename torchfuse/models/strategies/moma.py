"""Mixture of modality-aware experts: features are part of the sequence, with experts of their own.

Attention is the pretrained layer's for all tokens, see ``torchfuse.modules.experts.modality_experts``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import Tensor, nn

from torchfuse.models.strategies.fused_layers import fuse_layers
from torchfuse.models.strategies.routed_layers import RoutedLayersStrategy
from torchfuse.models.strategy import register_modality_strategy
from torchfuse.models.types import EncoderFeatures, ModalityContext, StrategyModel
from torchfuse.modules.experts.modality_experts import MoMaLayer, expert_load
from torchfuse.modules.experts.options import ExpertOptions

__all__ = ["MoMaStrategy"]

# Options of training, in which a model and an artifact may differ.
_OF_TRAINING: Final = ("start", "noise", "auxiliary_loss_weight", "pad_id")


@register_modality_strategy("moma")
@dataclass(frozen=True)
class MoMaStrategy(RoutedLayersStrategy, ExpertOptions):
    """Each encoder's features run through experts of their own in the fused layers.

    With ``placement="prefix"`` hidden states of features after the last layer of the decoder are unused,
    so that layer is not fused.

    Args:
        placement: ``"prefix"``: features in front of the text; ``"placeholder"``: in place of the
            encoder's token. None: ``"placeholder"`` if there is an ``encoder_token``, else ``"prefix"``.
        encoder_token: id of the placeholder, ``{name: id}`` for named encoders.
        layers: indices of the decoder layers to fuse. None: every k-th, by the ``every`` of ``fuse``,
            which is 1 unless given.
        num_experts: see ``ExpertOptions``, as for all that follow.
        num_text_experts: experts of text, the pretrained feed-forward among them.
        capacity: the share of its modality's tokens that an expert takes.
        start: first values of new experts.
        noise: whether noise is added to the routers' scores in training.
        auxiliary_router: whether the model will be able to generate, and to run in evaluation mode.
        auxiliary_dim: width inside auxiliary routers.
        auxiliary_loss_weight: of their loss, relative to the main loss (see ``mark_main_loss``).
        pad_id: id of padding, which no expert takes in training. None: every token competes.

    Raises:
        ConfigError: if an option is out of its range, or the last layer is named with ``"prefix"``.
    """

    layer_type: ClassVar[type[nn.Module]] = MoMaLayer

    pad_id: int | None = None

    def __post_init__(self) -> None:
        RoutedLayersStrategy.__post_init__(self)
        ExpertOptions.__post_init__(self)

    def padding(
        self, model: StrategyModel, tokens: Tensor, document_ids: Tensor | None
    ) -> Tensor | None:
        if document_ids is not None:
            return document_ids < 0
        # With caches too, so that a token of this id is scored the same with and without them.
        return None if self.pad_id is None else tokens == self.pad_id

    def prepare(
        self, model: StrategyModel, tokens: Tensor, features: Mapping[str, EncoderFeatures], **call: Any
    ) -> ModalityContext:
        for layer in self.fused_layers(model.decoder).values():
            layer.check_mode(training=model.training, cached=model.caches_are_enabled())
        return super().prepare(model, tokens, features, **call)

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        layers: Any = decoder.layers
        indices = self.layers_with_gradient(decoder, every)
        return fuse_layers(layers, indices, lambda index: MoMaLayer(layers[index], encoders, self))

    def modalities_of(self, layer: Any) -> list[str]:
        return list(layer.modalities)

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name not in _OF_TRAINING}

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        return {**super().describe(decoder), **{name: getattr(self, name) for name in _OF_TRAINING}}

    def statistics(self, model: nn.Module) -> dict[str, Any]:
        """Return ``expert_load``: by layer and modality the share of tokens that each expert took."""
        return {
            "expert_load": {
                layer: {name: [round(float(s), 3) for s in shares] for name, shares in load.items()}
                for layer, load in expert_load(model).items()
            }
        }
