"""Prompts: a question, or a conversation of several turns with a system text in front.

A conversation is one sequence: BOS, the system text and the first question, the answer as the model
generated it, the next question, and so on. Text around a question comes from the ``Template`` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchfuse.data.questions import (
    Question,
    QuestionTransform,
    image_problems,
    name_problems,
    question_from,
)
from torchfuse.errors import DataError

__all__ = ["Prompt", "Template", "encode_turn", "encode_turns", "prompts_from"]

_TEXT: Final = "{text}"
_MARKER: Final = "<image>"
_KEYS: Final = ("system", "turns")


@dataclass(frozen=True)
class Prompt:
    """Questions of one conversation, each with all earlier turns in context.

    Attributes:
        turns: the questions.
        system: text in front of the first.
    """

    turns: tuple[Question, ...]
    system: str | None = None


@dataclass(frozen=True)
class Template:
    r"""The text around a question and around a system text, which replace ``{text}``.

    Special tokens can be written out, if they are in the tokenizer.

    Attributes:
        system: around the system text.
        question: around a question, up to where the answer begins.

    Examples:
        >>> llava = Template(system="{text} ", question="USER: {text} ASSISTANT:")
        >>> llava.fill("<image>\nWhat is this?", system="Be brief.")
        'Be brief. USER: <image>\nWhat is this? ASSISTANT:'
    """

    system: str = "{text}\n"
    question: str = "{text}"

    def problems(self) -> list[str]:
        """Return what is wrong with it."""
        return [
            f"template.{name} must hold {_TEXT} once and no {_MARKER}, got {value!r}"
            for name, value in vars(self).items()
            if value.count(_TEXT) != 1 or _MARKER in value
        ]

    def fill(self, question: str, *, system: str | None = None) -> str:
        """Return the text of a turn, with the system text in front of the first."""
        front = "" if system is None else self.system.replace(_TEXT, system)
        return front + self.question.replace(_TEXT, question)


def prompts_from(records: Any, path: Path) -> list[Prompt]:
    """Check the prompts of a YAML file, and that every image in them opens.

    Each is a ``question`` with ``images``, as in a question file, or a conversation:

        - system: You are brief.
          turns:
            - question: "<image> which digit ?"
              images: [images/0012.png]
            - question: even or odd ?

    Args:
        records: the content of the file.
        path: the file; paths of images are relative to it.

    Raises:
        DataError: naming everything that is wrong with the file.
    """
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records) or not records:
        raise DataError(
            f"{path} must hold a list of prompts, each with a question, or with turns that have one."
        )
    prompts, problems = [], []
    checked: dict[Path, str] = {}
    for number, record in enumerate(records, 1):
        turns: list[Question] = []
        for where, turn in _turns(record):
            try:
                question = question_from(turn, path.parent)
            except ValueError as error:
                problems.append(f"prompt {number}{where}: {error}")
                continue
            problems += [
                f"prompt {number}{where}: {problem}" for problem in image_problems(question, checked)
            ]
            turns.append(question)
        problems += [f"prompt {number}: {problem}" for problem in _conversation_problems(record)]
        prompts.append(Prompt(tuple(turns), record.get("system")))
    if problems:
        raise DataError(name_problems(path, problems))
    return prompts


def _turns(record: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the questions of a prompt, and the position of each in it."""
    if not set(record) & set(_KEYS):
        yield "", record
    elif isinstance(record.get("turns"), list):
        for index, turn in enumerate(record["turns"], 1):
            if isinstance(turn, dict):
                yield f", turn {index}", turn


def _conversation_problems(record: Mapping[Any, Any]) -> list[str]:
    if not set(record) & set(_KEYS):
        return []
    problems = []
    unknown = sorted(map(str, set(record) - set(_KEYS)))
    if unknown:
        problems.append(
            f"unknown key {', '.join(unknown)}; a conversation has {', '.join(_KEYS)}, and its turns "
            "have question, images."
        )
    turns, system = record.get("turns"), record.get("system")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        problems.append(f"turns must be a list of questions with their images, got {turns!r}.")
    if "system" in record and (not isinstance(system, str) or not system or _MARKER in system):
        problems.append(f"system must be a text without {_MARKER}, got {system!r}.")
    return problems


def encode_turn(
    transform: QuestionTransform,
    template: Template,
    question: Question,
    *,
    first: bool,
    system: str | None = None,
) -> list[int]:
    """Return the ids of one turn, up to where its answer begins; those of the first begin with BOS.

    Raises:
        DataError: if the turn has no tokens, is too long for the transform, or has images in a later
            turn where all must come first.
    """
    if not first and question.images and transform.image_token is None:
        raise DataError(
            'with layout "prefix" images come in front of the sequence, so only the first turn can '
            f"have any, got {len(question.images)} with {question.question!r}"
        )
    tokenizer = transform.tokenizer
    asked = tokenizer.image_text.join(map(tokenizer.escape, question.question.split(_MARKER)))
    in_front = tokenizer.escape(system) if first and system is not None else None
    tokens = transform.encode_text(template.fill(asked, system=in_front), first=first)
    if transform.max_seq_len is not None and len(tokens) > transform.max_seq_len:
        raise DataError(
            f"The question {question.question!r} is {len(tokens)} tokens long, and max_seq_len is "
            f"{transform.max_seq_len}."
        )
    if not tokens:
        raise DataError(f"the tokenizer makes no token of {question.question!r}")
    return tokens


def encode_turns(
    transform: QuestionTransform,
    template: Template,
    prompts: Sequence[Prompt],
    *,
    path: str | Path,
    what: str = "prompt",
) -> list[list[list[int]]]:
    """Return the ids of every turn of every prompt.

    Args:
        transform: turns questions into ids.
        template: the text around them.
        prompts: the prompts.
        path: the file that they come from, for the message.
        what: the word for a prompt in the message.

    Raises:
        DataError: naming every turn that cannot be encoded.
    """
    encoded, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        turns = []
        for index, question in enumerate(prompt.turns):
            where = f"{what} {number}" + (f", turn {index + 1}" if len(prompt.turns) > 1 else "")
            try:
                tokens = encode_turn(
                    transform, template, question, first=not index, system=prompt.system
                )
            except ValueError as error:
                problems.append(f"{where}: {str(error).rstrip('.')}.")
            else:
                turns.append(tokens)
        encoded.append(turns)
    if problems:
        raise DataError(name_problems(path, problems))
    return encoded
