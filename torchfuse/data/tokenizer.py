"""The tokenizer in a language model's directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchfuse.errors import CheckpointError
from torchfuse.io.strict_json import read_json

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Text to ids and back, with the special tokens that the model's configuration names.

    ``eos_id`` ends a text in training; any of ``eos_ids`` ends one in generation. ``pad_id`` is the
    configured ``pad_token_id``. Where there is none, or one outside the vocabulary (-1 in early Llama
    directories), it is ``eos_id``: padding is masked, so any id that the model embeds serves. Only
    ``bos_id`` does not, since padding in front of a prompt must differ from its first token.

    Args:
        path: directory with ``tokenizer.json``, and ``config.json`` or ``generation_config.json`` for
            ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        CheckpointError: if a file is missing, or ``bos_token_id`` or ``eos_token_id`` is not configured.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no tokenizer.json.")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{file} is no tokenizer: {error}.") from error
        config = read_json(path / "config.json")
        more = path / "generation_config.json"
        if more.is_file():
            config |= {k: v for k, v in read_json(more).items() if v is not None}
        self.bos_id = _ids(config, "bos_token_id", path)[0]
        self.eos_ids = _ids(config, "eos_token_id", path)
        self.eos_id = self.eos_ids[0]
        pad, vocab_size = config.get("pad_token_id"), _vocab_size(config)
        self.pad_id: int = pad if isinstance(pad, int) and 0 <= pad < vocab_size else self.eos_id
        if self.pad_id == self.bos_id:
            self.pad_id = int(self.bos_id == 0)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _ids(config: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """Return the one id, or the several that Llama 3 lists."""
    value = config.get(name)
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(f"{path} must configure {name}, an id or a list of ids, got {value!r}.")
    return ids


def _vocab_size(config: dict[str, Any]) -> float:
    """Return how many ids the model embeds, without limit where the configuration lacks it."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else math.inf
