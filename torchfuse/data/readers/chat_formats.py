"""Records that hold a list of messages: LLaVA, ShareGPT, OpenAI, TRL, ms-swift, LLaMA-Factory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers.conversation import Piece, Place, Turn, split_tags
from torchfuse.data.readers.media_fields import MODALITIES, read_media
from torchfuse.data.samples import Role
from torchfuse.errors import DataError

__all__ = ["conversation_turns", "message_turns"]

_ROLES: Final[dict[Any, Role]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# Fields of a message whose content would be left out of training without notice.
_UNSUPPORTED: Final = ("tool_calls", "function_call", "reasoning_content", "thinking")


def conversation_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take the turns of ``{"conversations": [{"from": ..., "value": ...}, ...]}`` out of a record."""
    return [*_system(record, problems), *_turns(record, "conversations", root, problems)]


def message_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take the turns of ``messages``, or of ``prompt`` and ``completion``, out of a record.

    As in TRL, answers within a prompt are not learned. Beside ``messages``, a ``prompt`` alone is
    metadata.
    """
    system = _system(record, problems)
    if "messages" in record and "completion" in record:
        problems.append("there are both messages and completion; keep one")
    if "messages" in record or not {"prompt", "completion"} & record.keys():
        return [*system, *_turns(record, "messages", root, problems)]
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record.get(name), str):
            record[name] = [{"role": role, "content": record[name]}]
    prompt = [
        replace(turn, weight=0.0) if turn.role == "assistant" else turn
        for turn in _turns(record, "prompt", root, problems)
    ]
    return [*system, *prompt, *_turns(record, "completion", root, problems)]


def _system(record: dict[str, Any], problems: list[str]) -> list[Turn]:
    """Take the system prompt that LLaMA-Factory and ms-swift put beside the messages."""
    system = record.pop("system", "")
    if not isinstance(system, str):
        problems.append(f"system must be a text, got {system!r:.80}")
        return []
    return [Turn("system", [system])] if system else []


def _turns(record: dict[str, Any], field: str, root: Path, problems: list[str]) -> list[Turn]:
    if field not in record:
        problems.append(f"the field {field} is missing; there are {', '.join(record) or 'none'}")
        return []
    messages = record.pop(field)
    if not isinstance(messages, list):
        problems.append(f"{field} must be a list of messages, got {messages!r:.80}")
        return []
    turns = []
    for number, message in enumerate(messages, 1):
        found: list[str] = []
        turns.append(_turn(message, root, found))
        problems += [f"message {number} of {field}: {problem}" for problem in found]
    return turns


def _turn(message: Any, root: Path, problems: list[str]) -> Turn:
    """Return the turn of a message, without role or pieces where those are wrong."""
    if not isinstance(message, Mapping):
        problems.append(f"expected an object, got {message!r:.80}")
        return Turn(None, None)
    message = {key: value for key, value in message.items() if value is not None}
    if unsupported := [name for name in _UNSUPPORTED if message.get(name)]:
        problems.append(f"{', '.join(unsupported)} cannot be trained on; remove it")
    given = message.get("role", message.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        problems.append(f"unknown role {given!r:.80}; there are {', '.join(_ROLES)}")
    pieces: list[Piece] | None = None
    weight = 1.0
    try:
        weight = _weight(message, role)
    except DataError as error:
        problems.append(str(error))
    try:
        pieces = _pieces(message, root)
    except DataError as error:
        problems.append(str(error))
    return Turn(role, pieces, weight)


def _weight(message: Mapping[str, Any], role: Role | None) -> float:
    names = [name for name in ("loss", "weight") if name in message]
    if len(names) == 2:
        raise DataError("there are both loss and weight; keep one")
    value = message[names[0]] if names else 1
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(f"{names[0]} must be true, false or a number from 0, got {value!r:.80}")
    if names and value and role in ("system", "user"):
        raise DataError(f"{names[0]} is {value}, but only the assistant's messages are learned")
    return float(value) if role == "assistant" else 1.0


def _pieces(message: Mapping[str, Any], root: Path) -> list[Piece]:
    names = [name for name in ("content", "value") if name in message]
    if len(names) != 1:
        raise DataError(f"expected one of content and value, got {' and '.join(names) or 'none'}")
    content = message[names[0]]
    if isinstance(content, str):
        return split_tags(content)
    if not isinstance(content, list):
        raise DataError(f"{names[0]} must be a text or a list of parts, got {content!r:.80}")
    return [piece for part in content for piece in _part(part, root)]


def _part(part: Any, root: Path) -> list[Piece]:
    """Return the pieces of ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and their like."""
    if isinstance(part, str):
        return split_tags(part)
    given = part if isinstance(part, Mapping) else {}
    fields = {key: value for key, value in given.items() if value is not None}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return split_tags(fields["text"])
    modality = kind.removesuffix("_url") if isinstance(kind, str) else ""
    if modality not in MODALITIES:
        kinds = [f"{name}{suffix}" for name in MODALITIES for suffix in ("", "_url")]
        raise DataError(f"unknown part {part!r:.80}; there are text, {', '.join(kinds)}")
    names = [name for name in (kind, modality, "url", "path", "bytes") if name in fields]
    if not names:
        return [Place(modality, _index(fields.get("index")))]
    value = fields[names[0]]
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    return [read_media(value, root, modality)]


def _index(given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or given < 0):
        raise DataError(f"index must be an integer from 0, got {given!r:.80}")
    return given
