"""The file ``tokenizer.json``, whose special tokens are renamed before a tokenizer is built from it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from torchfuse.errors import CheckpointError

__all__ = ["TokenizerFile"]

_FLAGS: Final = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


class TokenizerFile:
    """The content of a ``tokenizer.json``.

    Args:
        folder: its directory.

    Raises:
        CheckpointError: if there is no such file, or it is no tokenizer's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tokenizer.json"
        if not self.path.is_file():
            raise CheckpointError(f"{folder} has no tokenizer.json.")
        try:
            self._content: dict[str, Any] = json.loads(self.path.read_bytes())
            self._added = {token["content"]: token for token in self._content["added_tokens"]}
            vocab = self._content["model"]["vocab"]
            self._vocab = vocab if isinstance(vocab, dict) else {v: i for i, (v, *_) in enumerate(vocab)}
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{self.path} is no tokenizer: {error!r}.") from error

    @property
    def has_post_processor(self) -> bool:
        """Whether it defines what the tokenizer puts around a text, be it nothing."""
        return self._content.get("post_processor") is not None

    @property
    def added_texts(self) -> Collection[str]:
        """Texts of the tokens beside the model's vocabulary."""
        return self._added.keys()

    @property
    def special_texts(self) -> Collection[str]:
        """Texts of those that it lists as special."""
        return [text for text, token in self._added.items() if token["special"]]

    def text(self, token_id: int) -> str | None:
        """Return the text of a token, None if there is none."""
        added = next((text for text, token in self._added.items() if token["id"] == token_id), None)
        return added or next((text for text, i in self._vocab.items() if i == token_id), None)

    def token_id(self, text: str) -> int | None:
        """Return the id of a token, None if there is none."""
        added = self._added.get(text)
        return self._vocab.get(text) if added is None else added["id"]

    def is_text(self, token_id: int, ends: Collection[int | None]) -> bool:
        """Whether a token occurs in text, or begins or ends one."""
        text = self.text(token_id)
        return text is not None and (text not in self._added or token_id in ends)

    def build(self, prefix: str, *, special: Collection[str], others: Collection[str]) -> Tokenizer:
        """Build the tokenizer, without truncation and padding, with other names of some tokens.

        Args:
            prefix: what is put in front of their names.
            special: texts of tokens that are special. Those of ordinary vocabulary become added tokens.
            others: texts of added tokens that keep what they are otherwise.

        Raises:
            CheckpointError: if the file is no tokenizer's.
        """
        content, model = self._content, self._content["model"]
        renamed = {*special, *others}
        content["truncation"] = content["padding"] = None
        for text in (self._vocab.keys() - self._added.keys()).intersection(special):
            token = {"id": self._vocab[text], "content": text, **_FLAGS, "special": True}
            content["added_tokens"].append(token)
        for token in content["added_tokens"]:
            token["special"] |= token["content"] in special
            if token["content"] in renamed:  # found wherever it is, before the text is normalized
                token |= {
                    "content": prefix + token["content"],
                    "normalized": False,
                    "single_word": False,
                }
        if isinstance(model["vocab"], dict):
            for text in renamed & model["vocab"].keys():
                model["vocab"][prefix + text] = model["vocab"].pop(text)
        else:
            for piece in model["vocab"]:
                piece[0] = prefix + piece[0] if piece[0] in renamed else piece[0]
        if model.get("unk_token") in renamed:
            model["unk_token"] = prefix + model["unk_token"]
        if "merges" in model:  # conversions of SentencePiece models merge "</" and "s>"
            merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [merge for merge in merges if renamed.isdisjoint([*merge, "".join(merge)])]
        try:
            return Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{self.path} is no tokenizer: {error}.") from error
