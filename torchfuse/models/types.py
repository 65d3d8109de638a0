"""Types that fused models, their encoders and their strategies share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from torch import Tensor, nn

from torchfuse.modules.experts.routing import Routing, keep_in_graph

__all__ = [
    "UNNAMED",
    "CacheState",
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

UNNAMED: Final = "encoder"
"""The name of the one encoder of a model whose encoder was given without a name."""


@dataclass(frozen=True)
class EncoderFeatures:
    """The features of one encoder for a batch, in the decoder's width and dtype.

    Features of no length, ``[b, 0, d]``, are replaced by a stand-in: the batch has no input for the
    encoder.

    Attributes:
        embeds: ``[b, n, d]``.
        mask: which features count: bool ``[b, s, n]`` (True: text position ``s`` may attend to
            feature ``n``) or ``[b, n]`` (True: feature ``n`` belongs to the row). None: all do.
        present: False for a stand-in, which is part of the graph, so that every rank runs the same
            parameters, and changes no bit of the result.
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
class CacheState:
    """What a model keeps between calls with caches, beside the keys and values in its layers.

    The model owns it: a strategy reads ``model.cache_state`` and returns a new one in its
    ``ModalityContext``. An architecture uses the fields that it needs.

    Attributes:
        encoder_mask: bool ``[b, 1, slots]``, True where the last token may attend to a cached feature;
            so may the tokens after it.
        prefix_mask: bool ``[b, 1, n]``, the same for features in front of the text.
        prefix_valid: bool ``[b, n]``, True where a position of the prefix belongs to the row.
        num_tokens: how many tokens of each modality but text the caches hold, ``[b, 1]``, by name.
    """

    encoder_mask: Tensor | None = None
    prefix_mask: Tensor | None = None
    prefix_valid: Tensor | None = None
    num_tokens: Mapping[str, Tensor] = field(default_factory=dict)

    def clone(self) -> CacheState:
        """Return the same state in memory of its own."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return CacheState(**{name: _clone(value) for name, value in values.items()})


def _clone(value: Tensor | Mapping[str, Tensor] | None) -> Any:
    if isinstance(value, Mapping):
        return {name: tensor.clone() for name, tensor in value.items()}
    return None if value is None else value.clone()


@dataclass(frozen=True)
class ModalityContext:
    """The input of the decoder.

    Attributes:
        tokens: ids, ``[b, s]``.
        embeds: ``[b, t, d]``, in place of the embeddings of ``tokens``. None: the decoder embeds them.
        mask: bool ``[b, t, t]`` (``[b, t, slots]`` with caches), True: may attend. None: causal.
        input_pos: positions, ``[b, t]`` or ``[t]``. None: ``0 .. t - 1``.
        encoder_input: features for cross-attention, ``[b, n, d]``.
        encoder_mask: bool ``[b, t, n]``, True: may attend.
        output_slice: which of the ``t`` positions are scored; the others never reach the head.
        routing: the modality of each of the ``t`` tokens, for layers that take it; only with
            ``embeds``. None: all are text.
        cache_state: the model's state after this call. None: the state does not change.
        document_ids: where rows hold several documents: the one that each token of ``tokens`` belongs
            to, ``[b, s]``. None: a row is one.
    """

    tokens: Tensor
    embeds: Tensor | None = None
    mask: Tensor | None = None
    input_pos: Tensor | None = None
    encoder_input: Tensor | None = None
    encoder_mask: Tensor | None = None
    output_slice: slice | None = None
    routing: Routing | None = None
    cache_state: CacheState | None = None
    document_ids: Tensor | None = None


class StrategyModel(Protocol):
    """What a strategy uses of the fused model that it belongs to; ``FusedModel`` has all of it.

    Attributes:
        decoder: the decoder, with the layers that the strategy put in place.
        tok_embeddings: the decoder's embeddings.
        training: whether the model is in training mode.
        strict: whether features without a placeholder in the text are an error.
        max_seq_len: the longest sequence that the decoder takes.
        encoder_max_cache_seq_len: slots of the caches of features; None without such caches.
        cache_state: the state after the last call with caches; None before the first.
    """

    decoder: nn.Module
    tok_embeddings: nn.Embedding
    training: bool
    strict: bool
    max_seq_len: int
    encoder_max_cache_seq_len: int | None
    cache_state: CacheState | None

    @property
    def encoder_names(self) -> list[str]:
        """The names of the encoders; ``["encoder"]`` for one without a name."""

    def get_encoder(self, name: str) -> nn.Module:
        """Return the encoder of a name in ``encoder_names``."""

    def get_adapter(self, name: str) -> nn.Module | None:
        """Return the adapter of an encoder; None if it has none."""

    def caches_are_enabled(self) -> bool:
        """Return whether caches are read and written."""
