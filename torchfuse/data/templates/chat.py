"""Chat templates: conversations as text, and which parts of it are learned.

A tokenizer's own template, a ``.jinja`` file or a named one is rendered as transformers renders it. The
answers are learned, each with the token that ends it; headers are not. Where a template marks answers by
``{% generation %}``, those marks decide; elsewhere an answer is what comes between the conversation
before it, with the generation prompt, and what follows it whatever its text is.
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, Final

import jinja2

from torchfuse.data.samples import Message
from torchfuse.data.templates.find import find_template, read_template
from torchfuse.data.templates.jinja import compile_template, find_blocks
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import ConfigError, DataError

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered", "last_answer"]

_FOLDER: Final = Path(__file__).parent
TEMPLATES: Final = tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))
"""Names of templates. ``plain`` has no words of its own."""

_BY_TOKENIZER: Final = ("plain", "vicuna")  # begin with what the tokenizer puts in front of a text
_PROBE: Final = "qzx"
_ANSWER: Final = f"\ufdd3{secrets.token_hex(8)}"  # no text spells it
_UNUSED: Final = {"tools": None, "documents": None}  # which templates of transformers test
_EMPTY: Final = dict.fromkeys(("bos_token", "eos_token", "boundary", "end_of_text"), "")
_EDGE: Final = re.compile("start|begin|end")  # of what is around an image
_NAME: Final = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
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
            found = find_template(Path(tokenizer))
            if found is not None:
                return cls(found.source, name=found.name, adds_bos=found.adds_bos)
            template = "plain"
        if template in TEMPLATES:
            file = _FOLDER / f"{template}.jinja"
            return cls(read_template(file), name=str(template), adds_bos=template in _BY_TOKENIZER)
        file = Path(template)
        if not file.is_file():
            raise ConfigError(
                f"template must be one of {', '.join(TEMPLATES)}, or a .jinja file; there is no file "
                f"{os.fspath(template)!r}."
            )
        return cls(read_template(file), name=str(file))

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
            blocks = [self._answer(messages, i, text, tokenizer) for i in answers]
        elif len(blocks) != len(answers):
            if any(messages[i].weight != 1 for i in answers):
                raise ConfigError(
                    f"{self.name} has {len(blocks)} blocks of {{% generation %}} for {len(answers)} "
                    "answers, so that the weights of messages have no place."
                )
            answers = answers[:1] * len(blocks)
        return Rendered(text, blocks, answers)

    def _answer(
        self, messages: Sequence[Message], index: int, whole: str, tokenizer: TextTokenizer
    ) -> tuple[int, int]:
        """Return where an answer is in the text of the conversation, with the end of its turn."""
        before, _ = self._render(messages[:index], tokenizer, prompt=True)
        other = [*messages[:index], replace(messages[index], content=[_ANSWER]), *messages[index + 1 :]]
        head, found, rest = self._render(other, tokenizer)[0].partition(_ANSWER)
        end = len(whole) - len(rest)
        follows = whole.startswith(before) and head.startswith(before) and len(before) <= end
        if not found or not follows or not whole.endswith(rest):
            raise ConfigError(
                f"{self.name} writes messages otherwise once others follow, so it does not show which "
                "tokens are an answer. Put {% generation %} ... {% endgeneration %} around what the "
                "model generates."
            )
        # What follows an answer at the end of a conversation, too, is the end of its turn.
        alone = self._render(other[: index + 1], tokenizer)[0].partition(_ANSWER)[2]
        return len(before), end + tokenizer.end_of_turn(_common_prefix(rest, alone))

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
        start, end = before.learned[-1]
        # A block may have whitespace after the token that ends a turn, which no model generates.
        answer = before.text[start:end].rstrip()
        end = start + len(answer) if tokenizer.ends_with_special(answer) else end
        if not whole.startswith(before.text[:end]):
            raise ConfigError(
                f"{self.name} writes earlier turns otherwise once another follows, so caches cannot be "
                "continued: run the whole conversation again."
            )
        return whole, end


def last_answer(messages: Sequence[Message]) -> int:
    """Return the index of the last answer of a conversation, -1 if it has none."""
    return max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _common_prefix(a: str, b: str) -> str:
    return a[: sum(takewhile(bool, map(eq, a, b)))]


def _image_text(without: str, shown: str) -> str:
    """Return what represents an image, of two texts that differ in one."""
    found = Counter(_NAME.findall(shown)) - Counter(_NAME.findall(without))
    names = [name for name in found if len(found) == 1 or not _EDGE.search(name)]
    start = len(_common_prefix(without, shown))
    return names[0] if names else shown[start : start + len(shown) - len(without)].strip()
