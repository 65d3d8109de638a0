"""A new layer next to a pretrained one, under the pretrained one's names.

Flamingo (https://arxiv.org/abs/2204.14198) puts a gated cross-attention layer in front of every k-th
layer of a frozen language model. ``FusionLayer`` runs the two layers one after
the other and keeps every name of the pretrained one, so that its checkpoint still fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.modules.fusion_wrapper import FusionWrapper

__all__ = ["FusionLayer"]


class FusionLayer(FusionWrapper):
    """Runs a new layer before or after a pretrained layer; names are the pretrained layer's.

    A parameter ``attn.q_proj.weight`` of ``layer`` is ``attn.q_proj.weight`` here too, in every view
    (see ``torchfuse.naming.TransparentWrapper``). The parameters of the new layer are
    registered under ``fusion_layer.`` and are what ``fusion_params`` names.

    Signature, attributes and key names are those of torchtune 0.6.1's ``FusionLayer``.

    Args:
        layer: the pretrained layer, called as ``layer(x, **kwargs)``.
        fusion_layer: the new layer, called in the same way and with the same keywords.
        fusion_first: whether the new layer runs before the pretrained one.

    Raises:
        ModelError: if ``layer`` has a member whose name would be hidden, such as ``fusion_layer``
            (a ``FusionLayer`` in a ``FusionLayer`` among them).

    Examples:
        >>> fused = FusionLayer(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> list(fused.state_dict())
        ['weight', 'bias', 'fusion_layer.weight', 'fusion_layer.bias']
        >>> fused.fusion_params()
        ['fusion_layer.weight', 'fusion_layer.bias']
    """

    layer: nn.Module
    fusion_layer: nn.Module

    def __init__(self, layer: nn.Module, fusion_layer: nn.Module, fusion_first: bool = True) -> None:
        super().__init__()
        self.fusion_layer = fusion_layer
        self.fusion_first = fusion_first
        self.wrap(layer, child="layer")

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run both layers.

        Args:
            x: hidden states, ``[b, s, d]``.
            **kwargs: passed to both layers.

        Returns:
            Hidden states, ``[b, s, d]``.
        """
        if self.fusion_first:
            return self.wrapped(self.fusion_layer(x, **kwargs), **kwargs)
        return self.fusion_layer(self.wrapped(x, **kwargs), **kwargs)

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None,
        decoder_max_seq_len: int | None,
    ) -> None:
        """Set up the key-value caches of both layers.

        Args:
            batch_size: rows of the caches.
            dtype: dtype of the caches.
            encoder_max_seq_len: slots for encoder features, for cross-attention.
            decoder_max_seq_len: slots for tokens, for self-attention.

        Raises:
            ModelError: if one of the layers has no way to set up a cache; nothing is set up then.
        """
        set_ups = [self._cache_method(m, "setup_caches", "setup_cache") for m in self._both()]
        for set_up in reversed(set_ups):  # the new layer first: it is the one that may refuse
            set_up(
                batch_size,
                dtype,
                encoder_max_seq_len=encoder_max_seq_len,
                decoder_max_seq_len=decoder_max_seq_len,
            )

    def setup_cache(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None,
        decoder_max_seq_len: int | None,
    ) -> None:
        """The older spelling of ``setup_caches``."""
        self.setup_caches(
            batch_size,
            dtype,
            encoder_max_seq_len=encoder_max_seq_len,
            decoder_max_seq_len=decoder_max_seq_len,
        )

    def caches_are_setup(self) -> bool:
        """Whether the pretrained layer's cache exists."""
        return self._cache_state("caches_are_setup")

    def caches_are_enabled(self) -> bool:
        """Whether the pretrained layer reads and writes its cache."""
        return self._cache_state("caches_are_enabled")

    @property
    def cache_enabled(self) -> bool:
        """The older spelling of ``caches_are_enabled``."""
        return self.caches_are_enabled()

    def reset_cache(self) -> None:
        """Empty the caches of both layers and keep their memory."""
        for reset in [self._cache_method(m, "reset_cache", "reset_caches") for m in self._both()]:
            reset()

    def reset_caches(self) -> None:
        """The decoder's spelling of ``reset_cache``."""
        self.reset_cache()

    def _cache_state(self, name: str) -> bool:
        method = getattr(self.wrapped, name, None)
        return bool(method() if callable(method) else getattr(self.wrapped, "cache_enabled", False))

    def _both(self) -> tuple[nn.Module, nn.Module]:
        return self.wrapped, self.fusion_layer

    @staticmethod
    def _cache_method(module: nn.Module, *spellings: str) -> Any:
        for name in spellings:
            method = getattr(module, name, None)
            if callable(method):
                return method
        raise ModelError(
            f"{type(module).__name__} has none of the methods {', '.join(spellings)}, which a layer "
            "must have to decode with caches. Give it one; where nothing is kept between steps it "
            "may do nothing."
        )
