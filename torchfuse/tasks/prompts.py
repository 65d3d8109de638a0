"""Prompts: samples of files in any format, and conversations of YAML files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers import read_samples
from torchfuse.data.readers.formats import FORMATS
from torchfuse.data.readers.read_all import media_problems, read_all
from torchfuse.data.samples import Media, Message, Sample
from torchfuse.errors import DataError, name_problems

__all__ = [
    "Prompt",
    "load_samples",
    "message_text",
    "prompt_record",
    "prompts_from",
    "user_message",
]

_IMAGE: Final = "<image>"
_KEYS: Final = ("system", "turns")


@dataclass(frozen=True)
class Prompt:
    """Questions of one conversation, each answered with all earlier turns in context.

    Attributes:
        turns: the user's messages.
        system: the system message in front of them.
    """

    turns: tuple[Message, ...]
    system: str | None = None


def user_message(text: str, images: Sequence[str | Path | Media] = ()) -> Message:
    """Return a question as a message of the user.

    Args:
        text: the question, with ``<image>`` for each image; without any, images come first.
        images: the images, or their paths.

    Raises:
        DataError: if tags and images differ in number, or the text is empty.

    Examples:
        >>> image, text = user_message("which ?", ["cat.png"]).content
        >>> str(image), text
        ('cat.png', ' which ?')
    """
    media = [Media(Path(image)) if isinstance(image, str | Path) else image for image in images]
    [message] = FORMATS["question"].read({"question": text, "images": media}, Path(), "").messages
    return message


def message_text(message: Message) -> str:
    """Return the text of a message, with ``<image>`` for each image."""
    parts = message.content
    return "".join(part if isinstance(part, str) else f"<{part.modality}>" for part in parts)


def prompt_record(messages: Sequence[Message], folder: str | Path) -> dict[str, Any]:
    """Return a prompt as JSON values.

    Args:
        messages: the prompt; the last message is the question.
        folder: where paths of images begin.

    Returns:
        ``question`` and ``images``, with other media under their own names; for a prompt of several
        messages also ``messages``, and the media of all of them.
    """
    record: dict[str, Any] = {"question": message_text(messages[-1]), "images": []}
    for media in (media for message in messages for media in message.media):
        record.setdefault(f"{media.modality}s", []).append(_relative(media, Path(folder)))
    if len(messages) > 1:
        turns = [{"role": message.role, "content": message_text(message)} for message in messages]
        record["messages"] = turns
    return record


def _relative(media: Media, folder: Path) -> str:
    if media.path is None or media.span is not None:
        return str(media)
    return os.path.relpath(media.path, folder)


def load_samples(
    path: str | Path, *, format: str = "auto", image_root: str | Path | None = None
) -> list[Sample]:
    """Read all samples of a file, and check that every image in it opens.

    Args:
        path: as for ``read_samples``, like all others.
        format: the format of the records.
        image_root: where relative paths begin.

    Raises:
        DataError: naming every row that is wrong.
    """
    return read_all(read_samples(path, format=format, image_root=image_root), path)


def prompts_from(records: Any, path: Path) -> list[Prompt]:
    """Check the prompts of a YAML file, and that every image in them is one.

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
    checked: dict[Media, str] = {}
    for number, record in enumerate(records, 1):
        turns: list[Message] = []
        for where, turn in _turns(record):
            try:
                turns.append(FORMATS["question"].read(turn, path.parent, "").messages[0])
            except DataError as error:
                problems.append(f"prompt {number}{where}: {error}.")
                continue
            found = media_problems(turns[-1].media, checked)
            problems += [f"prompt {number}{where}: {problem}" for problem in found]
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
    if "system" in record and (not isinstance(system, str) or not system or _IMAGE in system):
        problems.append(f"system must be a text without {_IMAGE}, got {system!r}.")
    return problems
