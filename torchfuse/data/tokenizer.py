"""The language model's own tokenizer, as its directory holds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from torchfuse.errors import DataError
from torchfuse.io.strict_json import read_json

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Text to ids and back, with the special tokens that the model's configuration names.

    ``eos_id`` ends a text that is learned; any of ``eos_ids`` ends one that is generated.

    Args:
        path: directory with ``tokenizer.json``, and ``config.json`` or ``generation_config.json`` for
            the ids of the sequence's begin and end. Padding is the configured one, or the end; where
            that is the begin too, as in some small models, it is another id, since padding in front of
            a prompt must not look like its begin.

    Raises:
        DataError: if a file is missing or an id is not configured.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{path} has no tokenizer.json.")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file} is no tokenizer: {error}.") from error
        config = read_json(path / "config.json")
        more = path / "generation_config.json"
        if more.is_file():
            config |= {k: v for k, v in read_json(more).items() if v is not None}
        self.bos_id = _ids(config, "bos_token_id", path)[0]
        self.eos_ids = _ids(config, "eos_token_id", path)
        self.eos_id = self.eos_ids[0]
        pad = config.get("pad_token_id")
        self.pad_id: int = self.eos_id if pad is None else int(pad)
        if self.pad_id == self.bos_id:
            self.pad_id = int(self.bos_id == 0)  # what it is does not matter: padding is masked

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _ids(config: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """One id or several, as Llama 3 lists its ends."""
    value = config.get(name)
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(isinstance(i, int) for i in ids):
        raise DataError(f"{path} does not configure {name}.")
    return ids
