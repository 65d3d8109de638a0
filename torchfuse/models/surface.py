"""A model that has everything its decoder has, without owning it twice.

Callers of a ``TransformerDecoder`` read attributes, assign some, and call methods for chunked output and
caches. ``DecoderSurface`` hands all of that to ``self.decoder``, the one owner.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from torchfuse.naming import unwrap

__all__ = ["DecoderSurface"]


class DecoderSurface(nn.Module):
    """The public surface of a ``TransformerDecoder``, delegated to ``self.decoder``.

    Reading and assigning an attribute that the decoder has and this module has not reaches the decoder:
    ``model.layers``, ``model.output_hidden_states = [3]``. Private names stay private, and a subclass
    lists in ``own_attributes`` what it sets itself, whatever the decoder has.
    """

    # A TransformerDecoder, or a wrapper around one.
    decoder: Any
    # The decoder's own, named here for readers and type checkers.
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

    # Whether layers of the decoder keep keys and values of encoder features.
    _caches_features = False

    def __init__(self) -> None:
        super().__init__()
        # What must be remembered from one cached call to the next, beside keys and values.
        self.cache_state: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            decoder = self.__dict__.get("_modules", {}).get("decoder")
            if decoder is None or name.startswith("_"):
                raise
            return getattr(decoder, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_decoders(name):
            setattr(unwrap(self.decoder), name, value)
        else:
            super().__setattr__(name, value)

    def _is_decoders(self, name: str) -> bool:
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
        """Have the head score the sequence in this many chunks, for chunked losses."""
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
            encoder_max_seq_len: slots for encoder tokens, in layers that attend to them; the decoder's
                ``max_seq_len`` unless given.
            decoder_max_seq_len: slots for the sequence, encoder tokens that stand in it included; the
                decoder's ``max_seq_len`` unless given.
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
        """Whether caches exist; never for a decoder without such a method."""
        return self._ask_decoder("caches_are_setup")

    def caches_are_enabled(self) -> bool:
        """Whether caches are read and written; never for a decoder without such a method."""
        return self._ask_decoder("caches_are_enabled")

    def _ask_decoder(self, method: str) -> bool:
        ask = getattr(self.decoder, method, None)
        return ask is not None and bool(ask())

    def reset_caches(self) -> None:
        """Empty the caches without giving their memory back."""
        self.decoder.reset_caches()
        self.cache_state = None
