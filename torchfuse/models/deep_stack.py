"""DeepStack: features stand in the sequence, and are added there again behind early layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch import nn

from torchfuse.models.mixture_fusion import MixtureFusionModel
from torchfuse.models.sequence import Placement, SequenceStrategy
from torchfuse.models.strategies import fuse_layers, layers_to_fuse, register_modality_strategy
from torchfuse.modules.deep_stack import DeepStackLayer
from torchfuse.naming import unwrap

__all__ = ["DeepStackStrategy"]

_EARLY: Final = 3  # as many as Qwen3-VL has


@register_modality_strategy("deepstack")
@dataclass(frozen=True)
class DeepStackStrategy(SequenceStrategy):
    """Features are added to the hidden states of their positions behind early layers, too.

    See ``torchfuse.modules.deep_stack``. Before its first step the model is that of ``joint_decoder``.

    Args:
        placement: ``"prefix"``: features stand in front of the text; ``"placeholder"``: in place of the
            encoder's token.
        encoder_token: the id in whose place features stand, ``{name: id}`` for named encoders.
        layers: behind which decoder layers features are added, counted from 0. None: the first three,
            or all but the last where there are fewer.
        hidden_dim: width inside the maps that add them. None: the decoder's.

    Raises:
        ValueError: if an option is out of its range, or the last layer is named with ``"prefix"``.
    """

    routes_tokens: ClassVar[bool] = True
    keeps_features: ClassVar[bool] = True

    placement: Placement = "prefix"
    layers: Sequence[int] | None = None
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {self.hidden_dim}.")

    def plan(self, decoder: nn.Module, encoders: Sequence[str], *, every: int) -> Callable[[], None]:
        layers: Any = decoder.layers
        embedding: Any = decoder.tok_embeddings
        last = len(layers) - 1
        early = list(range(min(_EARLY, last))) if self.layers is None else self.layers
        if not early or (self.placement == "prefix" and last in early):
            raise ValueError(
                f"Behind layer {last}, the last, nobody reads features that stand in front of the text; "
                f"got layers {list(early)}. Add them behind layers before it."
            )
        return fuse_layers(
            layers,
            layers_to_fuse(len(layers), early, every),
            lambda i: DeepStackLayer(layers[i], encoders, embedding.embedding_dim, self.hidden_dim),
        )

    def check_decoder(self, decoder: Any, encoders: Sequence[str]) -> None:
        layers = [unwrap(layer) for layer in getattr(decoder, "layers", ())]
        fused = [layer for layer in layers if isinstance(layer, DeepStackLayer)]
        wrong = [list(layer.fusion_layer) for layer in fused if set(layer.fusion_layer) != set(encoders)]
        if not fused or wrong:
            there = f"has maps for {', '.join(wrong[0])}" if wrong else "has no DeepStackLayer"
            raise ValueError(
                f"This decoder {there}, and the encoders are {', '.join(encoders)}. "
                'torchfuse.fuse(decoder, encoder, arch="deepstack") puts in place what is needed.'
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
        layers: Any = decoder.layers
        fused = [i for i, layer in enumerate(layers) if isinstance(unwrap(layer), DeepStackLayer)]
        return {**self.options(), "layers": fused}
