"""The public surface of a decoder, delegated to the decoder that a model holds.

Callers of a ``TransformerDecoder`` read attributes, assign some, and call methods for chunked output and
caches. ``DecoderSurface`` delegates all of it to ``self.decoder`` and registers no module twice.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from torchfuse.models.types import CacheState
from torchfuse.naming import unwrap

__all__ = ["DecoderSurface"]


class DecoderSurface(nn.Module):
    """The public surface of a ``TransformerDecoder``, delegated to ``self.decoder``.

    Reading or assigning an attribute that the decoder has and this module lacks acts on the decoder:
    ``model.layers``, ``model.output_hidden_states = [3]``. Private names are not delegated, and a
    subclass lists in ``own_attributes`` the names that it assigns to itself in any case.
    """

    # A TransformerDecoder, or a wrapper around one.
    decoder: Any
    # Attributes of the decoder, declared for readers and type checkers.
    tok_embeddings: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    max_seq_len: int
    num_heads: int
    head_dim: int
    output_hidden_states: list[int]
    num_output_chunks: int
    encoder_max_cache_seq_len: int | None
    decoder_max_cache_seq_len: int | None

    own_attributes: ClassVar[frozenset[str]] = frozenset()

    # Whether layers of the decoder cache keys and values of encoder features.
    _caches_features = False

    def __init__(self) -> None:
        super().__init__()
        self.cache_state: CacheState | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            decoder = self.__dict__.get("_modules", {}).get("decoder")
            if decoder is None or name.startswith("_"):
                raise
            return getattr(decoder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_delegated(name):
            setattr(unwrap(self.decoder), name, value)
        else:
            super().__setattr__(name, value)

    def _is_delegated(self, name: str) -> bool:
        own = self.__dict__
        decoder = own.get("_modules", {}).get("decoder")
        if decoder is None or name.startswith("_") or hasattr(type(self), name) or name in own:
            return False
        if name in self.own_attributes:
            return False
        if any(name in own[members] for members in ("_modules", "_parameters", "_buffers")):
            return False
        inner = unwrap(decoder)
        return name in vars(inner) or name in inner._modules

    def set_num_output_chunks(self, num_output_chunks: int) -> None:
        """Split the sequence into this many chunks in the head, for chunked losses."""
        self.decoder.set_num_output_chunks(num_output_chunks)

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Set up the key-value caches of every layer, on the device of the model.

        Args:
            batch_size: rows.
            dtype: dtype of the caches.
            encoder_max_seq_len: slots for features, in layers that attend to them; the decoder's
                ``max_seq_len`` unless given.
            decoder_max_seq_len: slots for the sequence, including the features in it; the decoder's
                ``max_seq_len`` unless given.
        """
        from torchfuse.models.cached_attention import use_cached_attention  # imports torchtune

        use_cached_attention(self.decoder)
        slots = encoder_max_seq_len or getattr(self.decoder, "max_seq_len", None)
        if self._caches_features and slots is not None:
            # torchtune's decoder sets it for torchtune's own cross-attention layers alone.
            self.decoder.encoder_max_cache_seq_len = slots
        with next(self.decoder.parameters()).device:
            self.decoder.setup_caches(
                batch_size,
                dtype,
                encoder_max_seq_len=encoder_max_seq_len,
                decoder_max_seq_len=decoder_max_seq_len,
            )
        self.cache_state = None

    def caches_are_setup(self) -> bool:
        """Return whether caches exist; False for a decoder without such a method."""
        return self._ask_decoder("caches_are_setup")

    def caches_are_enabled(self) -> bool:
        """Return whether caches are read and written; False for a decoder without such a method."""
        return self._ask_decoder("caches_are_enabled")

    def _ask_decoder(self, method: str) -> bool:
        ask = getattr(self.decoder, method, None)
        return ask is not None and bool(ask())

    def reset_caches(self) -> None:
        """Empty the caches without freeing their memory."""
        self.decoder.reset_caches()
        self.cache_state = None
