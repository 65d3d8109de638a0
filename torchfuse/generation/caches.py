"""Whose a model's caches are: a conversation's that sets them up, or the model's that finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.naming import unwrap

__all__ = ["Caches", "slots_of"]


def slots_of(model: Any) -> tuple[int, str]:
    """How many tokens a model holds, those of encoders included, and what says so."""
    if model.caches_are_setup() and model.decoder_max_cache_seq_len is not None:
        return int(model.decoder_max_cache_seq_len), "decoder_max_seq_len of the caches"
    return int(model.max_seq_len), "model's max_seq_len"


class Caches:
    """Caches for one conversation at a time.

    Those that are there are used, if they are large enough and empty, and given back empty; otherwise
    caches are set up, and removed at the end.

    Args:
        model: a fused model, or a plain decoder.
        batch_size: rows.
        max_tokens: tokens of text at most.
        max_features: encoder tokens of one turn at most.

    Raises:
        ModelError: if as much does not fit, or the caches hold a sequence.
    """

    def __init__(self, model: Any, *, batch_size: int, max_tokens: int, max_features: int) -> None:
        self.model = model
        strategy = getattr(unwrap(model), "strategy", None)
        extra = 0 if strategy is None else strategy.extra_tokens(max_features)
        most, limit = slots_of(model)
        self._found = bool(model.caches_are_setup())
        problems = []
        if max_tokens + extra > most:
            problems.append(
                f"{max_tokens} tokens of text and {extra} encoder tokens are more than the {limit} of "
                f"{most}"
            )
        if self._found:
            problems += self._misfits(batch_size, max_features)
        if problems:
            raise ModelError(f"{'; '.join(problems)}.")
        self.slots = most if self._found else max_tokens + extra
        if not self._found:
            self._set_up(batch_size, max(max_features, 1))

    def _misfits(self, batch_size: int, max_features: int) -> list[str]:
        caches: list[Any] = [getattr(module, "kv_cache", None) for module in self.model.modules()]
        caches = [cache for cache in caches if cache is not None]
        problems = []
        if rows := {cache.k_cache.shape[0] for cache in caches} - {batch_size}:
            problems.append(f"the caches hold {sorted(rows)[0]} rows, not {batch_size}")
        holds_features = [cache for cache in caches if hasattr(cache, "is_filled")]
        if any(cache.max_seq_len < max_features for cache in holds_features):
            slots = holds_features[0].max_seq_len
            problems.append(f"the caches hold {slots} encoder tokens, not {max_features}")
        if any(cache.is_filled if hasattr(cache, "is_filled") else cache.size for cache in caches):
            problems.append("the caches hold a sequence already; reset_caches() empties them")
        return problems

    def _set_up(self, rows: int, features: int) -> None:
        table: Tensor = next(self.model.tok_embeddings.parameters())
        kind = table.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else table.dtype
        with table.device:
            self.model.setup_caches(
                rows, dtype, encoder_max_seq_len=features, decoder_max_seq_len=self.slots
            )

    def release(self) -> None:
        """Leave the model as it was found: without caches, or with empty ones."""
        from torchtune.modules.common_utils import delete_kv_caches

        if not self.model.caches_are_setup():
            return
        if self._found:
            self.model.reset_caches()
        else:
            delete_kv_caches(self.model)
