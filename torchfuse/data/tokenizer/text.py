"""The tokenizer in a language model's directory.

Special tokens are renamed when ``tokenizer.json`` is read: the text of each gets a random prefix. So a
text that spells ``<|eot_id|>`` is text; only in a template's own text (``encode_template``) such words
get the prefix, and become tokens. One call of the tokenizer encodes a whole conversation, so that
merges, prefixes of words and whitespace around special tokens are those of the whole text.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from torchfuse.data.tokenizer.file import TokenizerFile
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.io.strict_json import read_json

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """Text to ids and back, with the special tokens that the model's configuration names.

    Truncation and padding that were saved in ``tokenizer.json`` do not apply.

    Args:
        path: directory with ``tokenizer.json``. ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``
            are those of ``generation_config.json``, ``config.json`` or else the special tokens in
            ``tokenizer_config.json``.
        image_token: id of images in the model's sequences; None: they have none.
        image_text: an image in a template's text. None: the tokenizer's text of ``image_token``, or
            ``<image>``.
        template: source of a template. Added tokens in it are special in what users write, even if the
            tokenizer does not list them as special.

    Attributes:
        bos_id: begins a text; None if there is no such token.
        eos_id: ends a text in training.
        eos_ids: any of them ends a text in generation.
        pad_id: the configured ``pad_token_id``. Where there is none, or one outside the vocabulary (-1
            in early Llama directories), it is ``eos_id``: padding is masked, so any id that the model
            embeds serves. Only ``bos_id`` does not, since padding in front of a prompt must differ from
            its first token.
        bos: the ids that the tokenizer's post-processor puts in front of a text. Where there is neither
            a post-processor nor a ``tokenizer_config.json``, ``bos_id``.
        special_tokens: texts of special tokens by name (``bos_token``, ``eos_token`` and others), for
            templates.
        end_of_text: text of ``eos_id``, for templates.
        boundary: a text for templates: what comes before and after it is encoded separately.

    Raises:
        CheckpointError: if a file is missing, or ``eos_token_id`` is not configured.
        ConfigError: if ``image_token`` is a token of ordinary text.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_token: int | None = None,
        image_text: str | None = None,
        template: str = "",
    ) -> None:
        path = Path(path)
        file = TokenizerFile(path)
        named, config = _named_tokens(path), _configuration(path)
        for name, text in (named or {}).items():  # for a tokenizer without a model
            if config.get(f"{name}_id") is None:
                config[f"{name}_id"] = file.token_id(text)
        has_bos = config.get("bos_token_id") is not None
        self.bos_id = _ids(config, "bos_token_id", path)[0] if has_bos else None
        self.eos_ids = _ids(config, "eos_token_id", path)
        self.eos_id = self.eos_ids[0]
        pad, vocab_size = config.get("pad_token_id"), _vocab_size(config)
        self.pad_id: int = pad if isinstance(pad, int) and 0 <= pad < vocab_size else self.eos_id
        if self.pad_id == self.bos_id:
            self.pad_id = int(self.bos_id == 0)
        self.image_token = image_token
        if image_token is not None and file.is_text(image_token, {self.bos_id, *self.eos_ids}):
            raise ConfigError(
                f"image_token {image_token} is {file.text(image_token)!r} in {path}, a token of text. "
                "It must be one that represents images only; fusion_vocab_size=1 adds a row for it."
            )
        self._hide_special_tokens(file, image_text, template)
        around = self._tokenizer.encode(self.boundary).ids
        self.bos: tuple[int, ...] = tuple(around[: around.index(self._token_id(self.boundary))])
        if named is None and not file.has_post_processor and self.bos_id is not None:
            self.bos = (self.bos_id,)
        if named is not None:
            self.special_tokens = named

    def _hide_special_tokens(self, file: TokenizerFile, image_text: str | None, template: str) -> None:
        nonce = secrets.token_hex(8)
        # Noncharacters of Unicode, which tokenizers do not merge with letters.
        self._prefix, self._break, self.boundary = (f"{c}{nonce}" for c in "\ufdd0\ufdd1\ufdd2")
        image = None if self.image_token is None else file.text(self.image_token)
        self.image_text = image_text or image or "<image>"
        ends = {i: file.text(i) or f"<{i}>" for i in (self.bos_id, *self.eos_ids) if i is not None}
        special = {*file.special_texts, *ends.values(), self.image_text, image or self.image_text}
        controls = {text for text in file.added_texts if text in template and not text.isspace()}
        self._tokenizer = file.build(self._prefix, special=special, others=controls)
        self._endings = (*special, *controls)
        self._images = re.compile(f"{re.escape(self.image_text)}(?!{self._break})")
        self.end_of_text = ends[self.eos_id]
        self._special = re.compile(_any_of(special))
        self._controls = re.compile(_any_of(special | controls))
        # A special token, unless `escape` has broken it, or what broke it.
        self._marks = re.compile(f"{self._break}|(?:{_any_of(special | controls)})(?!{self._break})")
        # Ids of the tokenizer that are others in the model, or none.
        self._to_model: dict[int, int | None] = {self._token_id(self.boundary): None}
        names = {self.image_text: self.image_token, **{text: i for i, text in ends.items()}}
        for text, model_id in names.items():
            own = self._token_id(self._prefix + text)
            if own != model_id:
                self._to_model[own] = model_id
        self.special_tokens = {"eos_token": self.end_of_text}
        if self.bos_id is not None:
            self.special_tokens["bos_token"] = ends[self.bos_id]

    def _token_id(self, text: str) -> int:
        """Return the tokenizer's id of a special token, which is added if it has none."""
        if self._tokenizer.token_to_id(text) is None:
            self._tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        token = self._tokenizer.token_to_id(text)
        assert token is not None
        return token

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens: those that it spells are text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def escape(self, text: str, *, controls: bool = True) -> str:
        """Return a text with its special tokens broken, so that they are text in ``encode_template``.

        Args:
            text: what a template is filled with.
            controls: whether added tokens that are not special, but written by the template, are broken
                too.
        """
        pattern = self._controls if controls else self._special
        if not pattern.search(text):
            return text
        return re.sub(f"(?=(?:{pattern.pattern}))(.)", rf"\1{self._break}", text, flags=re.DOTALL)

    def ends_with_special(self, text: str) -> bool:
        """Whether the last token of a filled template is special."""
        return text.endswith(self._endings)

    def end_of_turn(self, text: str) -> int:
        """Return where the first special token of a template's text ends, or the text if it has none."""
        found = self._controls.search(text)
        return found.end() if found else len(text)

    def count_images(self, text: str) -> int:
        """Return the number of images in a filled template."""
        return len(self._images.findall(text))

    def encode_template(
        self, text: str, spans: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a filled template, in which special tokens are tokens unless escaped.

        Args:
            text: the template's text, with contents that went through ``escape``.
            spans: disjoint parts of the text, in order: start and end of each.

        Returns:
            The ids, and for each the index of the part that it overlaps, or -1.
        """
        parts = [(len(self._mark(text[:start])), len(self._mark(text[:end]))) for start, end in spans]
        marked = self._mark(text)
        encoding = self._tokenizer.encode(marked, add_special_tokens=False)
        ids, owners, part = [], [], 0
        for own, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            token = self._to_model.get(own, own)
            word = marked[start:end]
            if self._prefix in word:  # without the whitespace that it strips from what is around it
                start, end = end - len(word.lstrip()), start + len(word.rstrip())
            while part < len(parts) and start >= parts[part][1]:
                part += 1
            if token is not None:
                ids.append(token)
                owners.append(part if part < len(parts) and end > parts[part][0] else -1)
        return ids, owners

    def _mark(self, text: str) -> str:
        """Rename the special tokens of a text, except those that were broken, which are mended."""
        return self._marks.sub(
            lambda found: "" if found[0] == self._break else self._prefix + found[0], text
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        text = str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
        return text.replace(self._prefix, "")


def _any_of(texts: Collection[str]) -> str:
    """Return a pattern that matches the longest of some texts.

    Common beginnings are written once: tokenizers have thousands of special tokens, and alternatives are
    tried one by one.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for letter in text:
            node = node.setdefault(letter, {})
        node[""] = {}  # a text ends here
    return _branches(tree)


def _branches(node: Mapping[str, Any]) -> str:
    branches = [re.escape(letter) + _branches(after) for letter, after in node.items() if letter]
    if "" not in node:
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{'|'.join(branches)})?" if branches else ""


def _configuration(path: Path) -> dict[str, Any]:
    """Return the settings of the model, if it has any; those of its generation override others."""
    config: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (path / name).is_file():
            config |= {key: value for key, value in read_json(path / name).items() if value is not None}
    return config


def _named_tokens(path: Path) -> dict[str, str] | None:
    """Return the special tokens by their names in ``tokenizer_config.json``; None without the file."""
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in read_json(file).items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _ids(config: Mapping[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """Return the one id, or the several that Llama 3 lists."""
    value = config.get(name)
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(f"{path} must configure {name}, an id or a list of ids, got {value!r}.")
    return ids


def _vocab_size(config: Mapping[str, Any]) -> float:
    """Return how many ids the model embeds, without limit where the configuration lacks it."""
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return size if isinstance(size, int) else math.inf
