"""Samples in torchtune's form, as its datasets and its recipe ``generate`` pass them to a tokenizer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from torchfuse.data.samples import ROLES, Content, Media, Message, Sample
from torchfuse.errors import DataError

__all__ = ["sample_from_torchtune"]


def sample_from_torchtune(record: Mapping[str, Any]) -> Sample:
    """Return the sample of a mapping whose ``messages`` are torchtune's.

    Messages that are ``masked`` are not learned.

    Raises:
        DataError: if there are no messages, or for a role or a part of a content that samples do not
            have.

    Examples:
        >>> from torchtune.data import Message as TorchtuneMessage
        >>> messages = [TorchtuneMessage("user", "one ?"), TorchtuneMessage("assistant", "one")]
        >>> sample_from_torchtune({"messages": messages}).answer
        'one'
    """
    if "messages" not in record:
        raise DataError(f"A sample must have messages, got {', '.join(map(str, record))}.")
    messages = []
    for number, message in enumerate(record["messages"], 1):
        if message.role not in ROLES:
            raise DataError(
                f"Message {number}: the role {message.role!r} is none of {', '.join(ROLES)}."
            )
        content: Content = []
        for part in message.content:
            if part["type"] not in ("text", "image"):
                raise DataError(f"Message {number}: a part of type {part['type']!r} cannot be used.")
            content.append(part["content"] if part["type"] == "text" else _media(part["content"]))
        messages.append(Message(message.role, content, float(not message.masked)))
    return Sample(messages)


def _media(image: Any) -> Media:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Media(data=file.getvalue())
