"""A conversation in a terminal, line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from torchfuse.data.images import open_image
from torchfuse.data.samples import Media, Message
from torchfuse.errors import DataError
from torchfuse.tasks.conversation import Conversation
from torchfuse.tasks.prompts import user_message

__all__ = ["HELP", "chat"]

HELP: Final = (
    "Type a question. /image PATH adds an image to the next one, /reset starts anew, /quit ends."
)


def chat(conversation: Conversation, lines: Iterable[str], write: Callable[[str], object]) -> None:
    """Answer lines of text until they end or one is ``/quit``.

    ``/image PATH`` adds an image to the next question, ``/reset`` starts a new conversation. An image
    that does not open or a turn that does not fit any more is one line of output, and changes nothing.

    Args:
        conversation: answers the questions.
        lines: the input.
        write: takes the output, piece by piece, line ends included.
    """
    images: list[Media] = []
    for line in lines:
        command, _, argument = line.strip().partition(" ")
        if not command:
            continue
        if command == "/quit":
            return
        try:
            if command == "/image":
                images.append(_image(argument))
                write(f"[{Path(str(images[-1])).name} comes with the next question]\n")
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


def _question(text: str, images: list[Media]) -> Message:
    try:
        return user_message(text, images)
    except DataError as error:
        raise DataError(
            f"{error}; /image adds one, and without <image> in the question images come first"
        ) from error


def _image(argument: str) -> Media:
    """Return the image whose path, quoted or not, is in the input, if it opens."""
    typed = argument.strip().strip("'\"")
    if not typed:
        raise DataError("/image needs the path of an image")
    path = Path(typed).expanduser()
    open_image(path)
    return Media(path)
