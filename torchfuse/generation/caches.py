"""The caches of one conversation: set up and removed with it, or the model's own, used and emptied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.modules.kv_cache import holds_sequence
from torchfuse.naming import unwrap

__all__ = ["Caches", "num_extra_tokens", "num_slots", "room_for_text"]


def num_slots(model: Any) -> tuple[int, str]:
    """Return the longest sequence that fits, encoder tokens included, and the name of that limit."""
    if model.caches_are_setup() and model.decoder_max_cache_seq_len is not None:
        return int(model.decoder_max_cache_seq_len), "decoder_max_seq_len of the caches"
    return int(model.max_seq_len), "model's max_seq_len"


def room_for_text(model: Any, num_features: int) -> int:
    """Return how many tokens of text fit beside this many features."""
    return num_slots(model)[0] - num_extra_tokens(model, num_features)


def num_extra_tokens(model: Any, num_features: int) -> int:
    """Return how many positions of the decoder's sequence this many features take beside the text."""
    strategy = getattr(unwrap(model), "strategy", None)
    return 0 if strategy is None else int(strategy.extra_tokens(num_features))


class Caches:
    """Caches for one conversation at a time.

    Caches that the model has are used if they are large enough and empty, and are emptied at the end;
    otherwise caches are set up, and removed at the end.

    Args:
        model: a fused model, or a plain decoder.
        batch_size: rows.
        max_tokens: most tokens of text.
        max_features: most encoder tokens of one turn.

    Raises:
        ModelError: if the sequence does not fit, or the caches hold one already.
    """

    def __init__(self, model: Any, *, batch_size: int, max_tokens: int, max_features: int) -> None:
        self.model = model
        most, limit = num_slots(model)
        extra = num_extra_tokens(model, max_features)
        self._found = bool(model.caches_are_setup())
        problems = []
        if max_tokens + extra > most:
            problems.append(
                f"{max_tokens} tokens of text and {extra} encoder tokens are more than the {limit} of "
                f"{most}"
            )
        if self._found:
            problems += self._found_problems(batch_size, max_features)
        if problems:
            raise ModelError(f"{'; '.join(problems)}.")
        self.slots = most if self._found else max_tokens + extra
        if not self._found:
            self._set_up(batch_size, max(max_features, 1))

    def _found_problems(self, batch_size: int, max_features: int) -> list[str]:
        caches: list[Any] = [getattr(module, "kv_cache", None) for module in self.model.modules()]
        caches = [cache for cache in caches if cache is not None]
        problems = []
        if rows := {cache.k_cache.shape[0] for cache in caches} - {batch_size}:
            problems.append(f"the caches hold {sorted(rows)[0]} rows, not {batch_size}")
        holds_features = [cache for cache in caches if hasattr(cache, "is_filled")]
        if any(cache.max_seq_len < max_features for cache in holds_features):
            slots = holds_features[0].max_seq_len
            problems.append(f"the caches hold {slots} encoder tokens, not {max_features}")
        if holds_sequence(self.model):
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
        """Remove the caches that were set up, or empty those that the model had."""
        from torchtune.modules.common_utils import delete_kv_caches

        if not self.model.caches_are_setup():
            return
        if self._found:
            self.model.reset_caches()
        else:
            delete_kv_caches(self.model)
