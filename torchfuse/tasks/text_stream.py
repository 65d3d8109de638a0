"""Text that is written while its tokens are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["TextStream"]

_INCOMPLETE: Final = "\ufffd"  # the text of half a character


class TextStream:
    """Writer of the text that each token adds.

    Tokens are never decoded alone, since the text of a token depends on its neighbours. A character is
    written when all of its bytes are there.

    Args:
        decode: text of tokens.
        write: takes the next piece of text.

    Examples:
        >>> pieces = []
        >>> stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
        >>> for byte in "né".encode():
        ...     stream.put(byte)
        >>> stream.end()
        >>> pieces
        ['n', 'é']
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object]) -> None:
        self._decode, self._write = decode, write
        self._tokens: list[int] = []
        self._written = ""

    def put(self, token: int) -> None:
        """Add the next token."""
        self._tokens.append(token)
        text = self._decode(self._tokens).rstrip(_INCOMPLETE)
        if text.startswith(self._written):
            self._show(text)

    def end(self) -> None:
        """Write the rest: then all pieces together are the text of all tokens."""
        text = self._decode(self._tokens)
        if not text.startswith(self._written):
            # Text that is written already has changed.
            self._write("\n")
            self._written = ""
        self._show(text)

    def _show(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text
