"""Decoders with no more than torchtune's fusion classes call: ``tok_embeddings`` and ``forward``.

The layers and the head of a ``TransformerDecoder`` are its attributes, so a fused model runs them on
embeddings itself. Any other decoder is called as a whole, and must take embeddings in place of ids.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchfuse.naming import TransparentWrapper

__all__ = ["accept_embeddings", "is_minimal"]


class _IdsOrEmbeddings(TransparentWrapper):
    """An embedding that returns embeddings unchanged; names are the embedding's."""

    embedding: nn.Module

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.wrap(embedding, child="embedding")

    def forward(self, x: Tensor) -> Any:
        """Embed ids ``[...]``, or return embeddings ``[..., d]``."""
        return x if x.is_floating_point() else self.wrapped(x)


def is_minimal(decoder: nn.Module) -> bool:
    """Return whether a decoder can only be called as a whole."""
    return not (hasattr(decoder, "layers") and hasattr(decoder, "unembed"))


def accept_embeddings(decoder: nn.Module) -> None:
    """Make a minimal decoder take embeddings ``[b, s, d]`` in place of ids ``[b, s]``."""
    embedding = getattr(decoder, "tok_embeddings", None)
    if isinstance(embedding, nn.Module) and not isinstance(embedding, _IdsOrEmbeddings):
        decoder.tok_embeddings = _IdsOrEmbeddings(embedding)
