"""The formats of records, by name, and the format of a record by its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers.chat_formats import conversation_turns, message_turns
from torchfuse.data.readers.conversation import Layout, Turn, build_messages
from torchfuse.data.readers.media_fields import take_media
from torchfuse.data.readers.question_formats import (
    caption_turns,
    question_turns,
    texts_turns,
    vqa_turns,
)
from torchfuse.data.samples import Sample
from torchfuse.errors import DataError

__all__ = ["FORMATS", "RecordFormat", "matching_formats"]


@dataclass(frozen=True)
class RecordFormat:
    """A format of records.

    Attributes:
        name: its name.
        fields: sets of fields by which it is recognised; a record has all fields of one set.
        take_turns: takes the turns out of a record, and adds to the record's problems.
        layout: where media without a place in the text belong.
    """

    name: str
    fields: tuple[frozenset[str], ...]
    take_turns: Callable[[dict[str, Any], Path, list[str]], list[Turn]]
    layout: Layout

    def read(self, record: Mapping[str, Any], root: Path, origin: str) -> Sample:
        """Return the sample of a record.

        Args:
            record: its fields; a field that is None is as good as missing.
            root: where relative paths begin.
            origin: file and row.

        Raises:
            DataError: with the problems of the record, at most ten of them.
        """
        fields = {name: value for name, value in record.items() if value is not None}
        problems: list[str] = []
        media = take_media(fields, root, problems)
        turns = self.take_turns(fields, root, problems)
        if not problems or turns:
            messages = build_messages(turns, media, self.layout, problems)
        if problems:
            more = [f"and {len(problems) - _LISTED:,} more"] if len(problems) > _LISTED else []
            raise DataError("; ".join(problems[:_LISTED] + more))
        return Sample(messages, fields, origin)


def _fields(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in sets)


_LISTED: Final = 10  # problems of a record
_ALL_FIRST: Final = Layout("all", " ")

FORMATS: Final = {
    found.name: found
    for found in (
        RecordFormat(
            "llava",
            _fields("conversations"),
            conversation_turns,
            Layout("one", "\n", single_first=True, image_tags_of_videos=True),
        ),
        RecordFormat("messages", _fields("messages", "prompt completion"), message_turns, Layout("one")),
        RecordFormat("texts", _fields("texts"), texts_turns, Layout("all")),
        RecordFormat("vqa", _fields("question answers", "context answers"), vqa_turns, _ALL_FIRST),
        RecordFormat("question", _fields("question"), question_turns, _ALL_FIRST),
        RecordFormat("caption", _fields("caption"), caption_turns, Layout("all")),
    )
}


def matching_formats(record: Mapping[str, Any]) -> list[str]:
    """Return the names of all formats whose fields a record has.

    Examples:
        >>> matching_formats({"question": "which ?", "answer": "two"})
        ['question']
        >>> matching_formats({"question": "which ?", "messages": []})
        ['messages', 'question']
    """
    present = {name for name, value in record.items() if value is not None}
    found = [name for name, form in FORMATS.items() if any(fields <= present for fields in form.fields)]
    return [name for name in found if name != "question" or "vqa" not in found]
