"""Samples: conversations of text and images, from whatever format they were read.

A sample names its images; nothing is opened until ``Media.read`` or ``open_image``.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import unquote

from torchfuse.errors import DataError

__all__ = ["ROLES", "Content", "Media", "Message", "Role", "Sample"]

Role = Literal["system", "user", "assistant"]
ROLES: Final = get_args(Role)

_LONGEST_PATH: Final = 4096  # characters


@dataclass(frozen=True)
class Media:
    """An image, or another input of an encoder, that has not been read yet.

    One of ``path`` and ``data`` is given.

    Attributes:
        path: its file.
        data: its encoded bytes, as in a parquet file.
        span: offset and length in the file, for a member of a tar file. None: the whole file.
        name: its name for messages, where ``path`` is not enough.
        modality: ``"image"``, ``"video"``, or the name of an encoder of the user's own.
    """

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)
    span: tuple[int, int] | None = None
    name: str = ""
    modality: str = "image"

    def __post_init__(self) -> None:
        if (self.path is None) == (self.data is None):
            raise DataError(f"{self.modality} {self.name!r} needs either a path or data.")

    def __str__(self) -> str:
        return self.name or (f"{len(self.data)} bytes" if self.data is not None else str(self.path))

    def read(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            DataError: if the file cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                if self.span is None:
                    return file.read()
                file.seek(self.span[0])
                content = file.read(self.span[1])
        except OSError as error:
            raise DataError(
                f"The {self.modality} {self} cannot be read: {error.strerror or error}."
            ) from error
        if len(content) != self.span[1]:
            raise DataError(
                f"The {self.modality} {self} cannot be read: {self.path} has become shorter."
            )
        return content

    def digest(self) -> str:
        """Return the SHA-256 of the encoded bytes, in hexadecimal."""
        return hashlib.sha256(self.read()).hexdigest()

    @classmethod
    def from_url(cls, url: str, root: Path, *, modality: str = "image") -> Media:
        """Return the media of a path below ``root``, a ``file:`` URL or a ``data:`` URL.

        Raises:
            DataError: for a ``data:`` URL that is not base64, for one that would be downloaded, and for
                a text that can be no path, as base64 without ``data:``.

        Examples:
            >>> Media.from_url("data:image/png;base64,aGk=", Path()).read()
            b'hi'
            >>> str(Media.from_url("cat.jpg", Path("images")))
            'images/cat.jpg'
        """
        scheme, _, rest = url.partition(":")
        if scheme.lower() == "data":
            kind, comma, text = rest.partition(",")
            try:
                if not comma or not kind.endswith(";base64"):
                    raise ValueError
                return cls(
                    data=base64.b64decode(text, validate=True), name="data: URL", modality=modality
                )
            except ValueError as error:
                raise DataError(
                    f"expected data:{modality}/...;base64,..., got {url[:40]!r}..."
                ) from error
        if len(url) > _LONGEST_PATH or "\0" in url:
            raise DataError(f"{url[:40]!r}... is no path; put data:{modality}/...;base64, before base64")
        local = rest.removeprefix("//").removeprefix("localhost")
        if scheme.lower() == "file" and local.startswith("/"):
            return cls(Path(unquote(local)), modality=modality)
        if rest.startswith("//"):
            raise DataError(f"{url!r} would have to be downloaded; save it and give its path")
        return cls(root / url, modality=modality)  # a file's name can have a colon


Content = list[str | Media]


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: pieces of text and media, in their order.
        weight: factor of the loss of this message's tokens; 0: not learned. Only for the assistant's.
    """

    role: Role
    content: Content
    weight: float = 1.0

    @property
    def text(self) -> str:
        """The pieces of text, joined."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def media(self) -> list[Media]:
        """The pieces that are not text."""
        return [part for part in self.content if isinstance(part, Media)]


@dataclass(frozen=True)
class Sample:
    """A conversation, and where it was read.

    Attributes:
        messages: an optional system message first, then turns of user and assistant.
        metadata: other fields of the record, such as ``id`` and ``kind``.
        origin: file and row, for messages.

    Examples:
        >>> cat = Media(Path("cat.jpg"))
        >>> question = Message("user", [cat, "Which animal?"])
        >>> sample = Sample([question, Message("assistant", ["A cat."])])
        >>> [str(image) for image in sample.images], sample.answer
        (['cat.jpg'], 'A cat.')
    """

    messages: list[Message]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def media(self) -> list[Media]:
        """All media of all messages, in their order."""
        return [media for message in self.messages for media in message.media]

    @property
    def images(self) -> list[Media]:
        """The media whose modality is ``"image"``."""
        return [media for media in self.media if media.modality == "image"]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last one of the assistant, or all where the user's comes last."""
        last = self.messages[-1:]
        return self.messages[:-1] if last and last[0].role == "assistant" else self.messages

    @property
    def answer(self) -> str | None:
        """The text of the assistant's message at the end; None where there is none."""
        last = self.messages[-1:]
        return last[0].text if last and last[0].role == "assistant" else None
