"""Chat templates: conversations as text, and which parts of it are learned.

A tokenizer's own template, a ``.jinja`` file or a named one is rendered as transformers renders it. The
answers are learned, each with the token that ends it; headers are not. Where a template marks answers by
``{% generation %}``, those marks decide; elsewhere an answer is the difference between the conversation
before it, with the generation prompt, and after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import jinja2

from torchfuse.data.samples import Message
from torchfuse.data.templates.jinja import compile_template, find_blocks
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import ConfigError, DataError
from torchfuse.io.strict_json import read_json

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered", "last_answer"]

_FOLDER: Final = Path(__file__).parent
TEMPLATES: Final = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
"""Names of templates. ``plain`` has no words of its own."""

_BY_TOKENIZER: Final = ("plain", "vicuna")  # begin with what the tokenizer puts in front of a text
_PROBE: Final = "qzx"
_UNUSED: Final = {"tools": None, "documents": None}  # which templates of transformers test
_EMPTY: Final = dict.fromkeys(("bos_token", "eos_token", "boundary", "end_of_text"), "")
_EDGE: Final = re.compile("start|begin|end")  # of what is around an image
_GENERATION: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: as ``TextTokenizer.encode_template`` takes it.
        learned: start and end of each part that is learned.
        messages: the index of the message that each of these belongs to.
    """

    text: str
    learned: list[tuple[int, int]]
    messages: list[int]


class ChatTemplate:
    """Conversations as text, by a Jinja template.

    Args:
        source: the template.
        name: its name in messages.
        adds_bos: whether what the tokenizer puts in front of a text comes in front of a conversation
            too, if the template does not begin with it. False: the template alone decides.

    Raises:
        ConfigError: if it is no Jinja template, or if it does not show what is learned.
    """

    def __init__(self, source: str, *, name: str = "template", adds_bos: bool = False) -> None:
        self.source, self.name, self.adds_bos = source, name, adds_bos
        self._template = self._compile()
        self.marks_answers = _GENERATION.search(source) is not None
        self._probe()

    def _compile(self) -> jinja2.Template:
        try:
            return compile_template(self.source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self.name} is no Jinja template: {error}.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_template"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._template = self._compile()

    @classmethod
    def load(cls, template: str | Path | ChatTemplate | None, tokenizer: str | Path) -> ChatTemplate:
        """Return a template by its name, from a ``.jinja`` file, or the one of a tokenizer.

        Args:
            template: a name in ``TEMPLATES``, or a file. None: the tokenizer's own, ``plain`` if it has
                none.
            tokenizer: the tokenizer's directory.

        Raises:
            ConfigError: for an unknown name, or if the template cannot be used.
            CheckpointError: if a file of the tokenizer is damaged.
        """
        if isinstance(template, ChatTemplate):
            return template
        if template is None:
            return cls._of_tokenizer(Path(tokenizer))
        if template in TEMPLATES:
            file = _FOLDER / f"{template}.jinja"
            return cls(_read(file), name=str(template), adds_bos=template in _BY_TOKENIZER)
        file = Path(template)
        if not file.is_file():
            raise ConfigError(
                f"template must be one of {', '.join(TEMPLATES)}, or a .jinja file; there is no file "
                f"{os.fspath(template)!r}."
            )
        return cls(_read(file), name=str(file))

    @classmethod
    def _of_tokenizer(cls, folder: Path) -> ChatTemplate:
        # A processor, unlike a tokenizer, adds BOS where its template does not.
        of_processor = (folder / "processor_config.json").is_file()
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(_read(file), name=str(file), adds_bos=of_processor)
        for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
            found = read_json(file).get("chat_template") if file.is_file() else None
            if isinstance(found, list):
                found = {entry["name"]: entry["template"] for entry in found}.get("default")
            if isinstance(found, str):
                of_processor |= file.name == "chat_template.json"
                return cls(found, name=f"{file}, chat_template", adds_bos=of_processor)
        return cls.load("plain", folder)

    def _probe(self) -> None:
        """Find out what a content may be, how an image is written, and that answers can be told apart.

        A content is a string, or a list of parts as in templates of image models. ``image_text`` is how
        an image in such a list is written; None: images are written in the text.
        """
        text = {"type": "text", "text": _PROBE}
        as_text, as_parts = self._try(_user(_PROBE)), self._try(_user([text]))
        self._takes_text = _PROBE in as_text
        self._takes_parts = _PROBE in as_parts and not re.search(f"['\"]{_PROBE}", as_parts)
        if not self._takes_text and not self._takes_parts:
            raise ConfigError(f"{self.name} does not write the text of a user's message.")
        shown = self._try(_user([{"type": "image"}, text])) if self._takes_parts else ""
        self.image_text = _image_text(as_parts, shown) if _PROBE in shown else None
        if self.marks_answers:
            return
        question, answer = (
            {"role": role, "content": _PROBE + role if self._takes_text else [text]}
            for role in ("user", "assistant")
        )
        before = self._try([question], add_generation_prompt=True)
        after = self._try([question, answer])
        if after and not after.removeprefix(before).lstrip().startswith(_PROBE):
            raise ConfigError(
                f"{self.name} does not show which tokens are an answer: it has no {{% generation %}} "
                "block, and its generation prompt is not all that comes before an answer. Put "
                "{% generation %} ... {% endgeneration %} around what the model generates."
            )

    def _try(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the text of messages, an empty one if the template refuses them."""
        try:
            rendered = self._template.render(messages=messages, **_UNUSED, **_EMPTY, **variables)
            return find_blocks(rendered)[0]
        except Exception:  # what a template calls can raise anything
            return ""

    def _render(
        self, messages: Sequence[Message], tokenizer: TextTokenizer, *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages, and its ``{% generation %}`` blocks."""
        image = self.image_text or tokenizer.image_text
        try:
            rendered = self._template.render(
                messages=[self._fields(message, tokenizer, image) for message in messages],
                add_generation_prompt=prompt,
                boundary=tokenizer.boundary,
                end_of_text=tokenizer.end_of_text,
                **_UNUSED,
                **tokenizer.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the template {self.name} refuses the conversation: {error}") from error
        except Exception as error:  # what a template calls can raise anything
            raise ConfigError(f"{self.name} fails: {type(error).__name__}: {error}.") from error
        text, blocks = find_blocks(rendered)
        given = sum(len(message.media) for message in messages)
        if (written := tokenizer.count_images(text)) != given:
            raise ConfigError(f"{self.name} writes {written} images of a conversation that has {given}.")
        return text, blocks

    def _fields(self, message: Message, tokenizer: TextTokenizer, image: str) -> dict[str, Any]:
        """Return a message as the template takes it."""
        controls = message.role != "assistant"
        texts = [""]  # one more than media
        for part in message.content:
            if isinstance(part, str):
                texts[-1] += part
            else:
                texts.append("")
        texts = [tokenizer.escape(text, controls=controls) for text in texts]
        content: Any = image.join(texts)
        if self._takes_parts and ((message.media and self.image_text) or not self._takes_text):
            content = []
            for index, text in enumerate(texts):
                content += [{"type": "image"}] if index else []
                content += [{"type": "text", "text": text}] if text or len(texts) == 1 else []
        return {"role": message.role, "content": content}

    def render(self, messages: Sequence[Message], tokenizer: TextTokenizer) -> Rendered:
        """Return a conversation as text, with what is learned of it.

        Args:
            messages: the conversation.
            tokenizer: made with ``image_text`` and ``source`` of this template.

        Raises:
            DataError: if the template refuses the conversation.
            ConfigError: if the template does not show what is learned, or leaves out images.
        """
        text, blocks = self._render(messages, tokenizer)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not self.marks_answers:
            blocks = [self._answer(messages[: i + 1], text, tokenizer) for i in answers]
        elif len(blocks) != len(answers):
            if any(messages[i].weight != 1 for i in answers):
                raise ConfigError(
                    f"{self.name} has {len(blocks)} blocks of {{% generation %}} for {len(answers)} "
                    "answers, so that the weights of messages have no place."
                )
            answers = answers[:1] * len(blocks)
        return Rendered(text, blocks, answers)

    def _answer(
        self, messages: Sequence[Message], whole: str, tokenizer: TextTokenizer
    ) -> tuple[int, int]:
        """Return where the last of these messages is in the text of the whole conversation."""
        before, _ = self._render(messages[:-1], tokenizer, prompt=True)
        after, _ = self._render(messages, tokenizer)
        if not whole.startswith(after) or not after.startswith(before):
            raise ConfigError(
                f"{self.name} writes messages otherwise once others follow, so it does not show which "
                "tokens are an answer. Put {% generation %} ... {% endgeneration %} around what the "
                "model generates."
            )
        # What follows the token that ends a turn belongs to the next one.
        stripped = after.rstrip()
        end = stripped if tokenizer.ends_with_special(stripped) else after
        return len(before), max(len(before), len(end))

    def prompt(self, messages: Sequence[Message], tokenizer: TextTokenizer) -> str:
        """Return the text of a conversation up to where the next answer begins.

        Raises:
            DataError: if the template refuses the conversation.
        """
        return self._render(messages, tokenizer, prompt=True)[0]

    def next_turn(self, messages: Sequence[Message], tokenizer: TextTokenizer) -> tuple[str, int]:
        """Return the text of ``prompt``, and where in it the last answer of the conversation ends.

        Raises:
            DataError: if the template refuses the conversation.
            ConfigError: if the template writes earlier turns otherwise than before.
        """
        whole = self.prompt(messages, tokenizer)
        before = self.render(messages[: last_answer(messages) + 1], tokenizer)
        end = before.learned[-1][1]
        if not whole.startswith(before.text[:end]):
            raise ConfigError(
                f"{self.name} writes earlier turns otherwise once another follows, so caches cannot be "
                "used: begin a new conversation for each question."
            )
        return whole, end


def last_answer(messages: Sequence[Message]) -> int:
    """Return the index of the last answer of a conversation, -1 if it has none."""
    return max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _image_text(without: str, shown: str) -> str:
    """Return what represents an image, of two texts that differ in one."""
    same = (a == b for a, b in zip(without, shown, strict=False))
    start = sum(takewhile(bool, same))
    added = shown[start : start + len(shown) - len(without)]
    names = [name for name in re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", added) if not _EDGE.search(name)]
    return names[0] if names else added.strip()


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The template {file} cannot be read: {error}.") from error
