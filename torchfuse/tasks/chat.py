"""A conversation that is typed, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from torchfuse.data.images import open_image
from torchfuse.data.questions import Question
from torchfuse.errors import DataError
from torchfuse.tasks.conversation import Conversation

__all__ = ["HELP", "chat"]

HELP: Final = (
    "Type a question. /image PATH shows an image with the next one, /reset starts anew, /quit leaves."
)


def chat(conversation: Conversation, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answer lines of text until they end or one says ``/quit``.

    ``/image PATH`` adds an image to the next question, ``/reset`` starts anew. What cannot be done, an
    image that does not open, a turn that does not fit any more, is told in one line, and the
    conversation goes on as if it had not been asked for.

    Args:
        conversation: what answers.
        lines: what is typed, line by line.
        write: takes what is to be shown, piece by piece, with the ends of lines.
    """
    images: list[Path] = []
    for line in lines:
        command, _, argument = line.strip().partition(" ")
        if not command:
            continue
        if command == "/quit":
            return
        try:
            if command == "/image":
                images.append(_image(argument))
                write(f"[{images[-1].name} comes with the next question]\n")
            elif command == "/reset":
                conversation.reset(conversation.system)
                images.clear()
                write("[a new conversation]\n")
            elif command.startswith("/"):
                write(f"[{command} is no command. {HELP}]\n")
            else:
                conversation.ask(_question(line.strip(), images), stream=write)
                write("\n")
                images.clear()
        except ValueError as error:
            write(f"[{' '.join(str(error).split())}]\n")


def _question(text: str, images: list[Path]) -> Question:
    try:
        return Question(text, tuple(images))
    except ValueError as error:
        raise DataError(f"{error}; /image adds one, and without any mark images come first") from error


def _image(argument: str) -> Path:
    """The path that was typed, quoted or not, of an image that opens."""
    typed = argument.strip().strip("'\"")
    if not typed:
        raise DataError("/image needs the path of an image")
    path = Path(typed).expanduser()
    open_image(path)
    return path
