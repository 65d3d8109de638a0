"""Text that appears while its tokens are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["TextStream"]

_INCOMPLETE: Final = "\ufffd"  # what a decoder makes of half a character


class TextStream:
    """Writes what each token adds to the text of those before it.

    Tokens are never decoded alone, since a tokenizer joins them to words and characters by what stands
    beside them. A character whose bytes have not all come is held back.

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
        """Take the next token."""
        self._tokens.append(token)
        text = self._decode(self._tokens).rstrip(_INCOMPLETE)
        if text.startswith(self._written):
            self._show(text)

    def end(self) -> None:
        """Write what was held back; the pieces together are the text of all tokens then."""
        text = self._decode(self._tokens)
        if not text.startswith(self._written):
            # The tokenizer changed its mind about what stands there already.
            self._write("\n")
            self._written = ""
        self._show(text)

    def _show(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text
