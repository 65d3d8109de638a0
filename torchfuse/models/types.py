"""Types that fused models, their encoders and their strategies share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from torchfuse.modules.experts.routing import Routing, keep_in_graph

__all__ = [
    "EncoderFeatures",
    "EncoderInput",
    "EncoderMask",
    "ModalityContext",
    "OnMissing",
    "StrategyModel",
]

EncoderInput = Mapping[str, Any]
EncoderMask = Tensor | Mapping[str, Tensor]
OnMissing = Literal["skip", "participate"]


@dataclass(frozen=True)
class EncoderFeatures:
    """What one encoder has to say about a batch, in the decoder's width and dtype.

    No features at all, ``[b, 0, d]``, become a stand-in: the batch is one without input for the encoder.

    Attributes:
        embeds: ``[b, n, d]``.
        mask: which features count: bool ``[b, s, n]`` (True: text position ``s`` may attend to
            feature ``n``) or ``[b, n]`` (True: feature ``n`` belongs to the row). None: all do.
        present: False for a stand-in, which must take part in the computation (so that every rank
            runs the same parameters) without changing a bit of the result.
    """

    embeds: Tensor
    mask: Tensor | None = None
    present: bool = True

    def __post_init__(self) -> None:
        if self.embeds.shape[:2].numel():
            return
        stand_in = keep_in_graph(self.embeds.new_zeros(1, 1, self.embeds.shape[-1]), self.embeds)
        for name, value in (("embeds", stand_in), ("mask", None), ("present", False)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ModalityContext:
    """What the decoder consumes.

    Attributes:
        tokens: ``[b, s]``.
        embeds: ``[b, t, d]``, in place of the embeddings of ``tokens``. None: the decoder embeds.
        mask: bool ``[b, t, t]`` (``[b, t, slots]`` with caches), True: may attend. None: causal.
        input_pos: positions, ``[b, t]`` or ``[t]``. None: ``0 .. t - 1``.
        encoder_input: features for the layers, ``[b, n, d]``.
        encoder_mask: bool ``[b, t, n]``, True: may attend.
        output_slice: the positions of the ``t`` that are scored; the others never reach the head.
        routing: which of the ``t`` tokens are of which modality, for layers that want to know; only
            with ``embeds``. None: no layer is told, all are text.
    """

    tokens: Tensor
    embeds: Tensor | None = None
    mask: Tensor | None = None
    input_pos: Tensor | None = None
    encoder_input: Tensor | None = None
    encoder_mask: Tensor | None = None
    output_slice: slice | None = None
    routing: Routing | None = None


class StrategyModel(Protocol):
    """What a strategy uses of the fused model that it belongs to; ``FusedModel`` has it all.

    Attributes:
        decoder: the decoder, with what the strategy put in place.
        tok_embeddings: the decoder's table.
        training: whether the model is in training mode.
        strict: whether features that no token of the text takes are an error.
        max_seq_len: the longest sequence that the decoder takes.
        encoder_max_cache_seq_len: slots of the caches of features, where there are any.
        cache_state: what the strategy keeps between calls with caches; None before the first.
    """

    decoder: nn.Module
    tok_embeddings: nn.Embedding
    training: bool
    strict: bool
    max_seq_len: int
    encoder_max_cache_seq_len: int | None
    cache_state: Any

    @property
    def encoder_names(self) -> list[str]:
        """The names of the encoders; ``["encoder"]`` for one without a name."""

    def get_encoder(self, name: str) -> nn.Module:
        """The encoder of a name in ``encoder_names``."""

    def get_adapter(self, name: str) -> nn.Module | None:
        """The adapter behind the encoder of this name, if it has one."""

    def caches_are_enabled(self) -> bool:
        """Whether caches are read and written."""
