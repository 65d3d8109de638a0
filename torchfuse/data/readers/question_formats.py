"""Records of questions with answers: question files, visual question answering, captions, cauldron."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers.conversation import Turn, split_tags

__all__ = ["caption_turns", "question_turns", "texts_turns", "vqa_turns"]

_QUESTION_FIELDS: Final = ("question", "answer", "images", "kind")


def question_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take ``question`` and ``answer`` out of a record that has no field but these and ``kind``."""
    if unknown := sorted(set(record) - set(_QUESTION_FIELDS)):
        problems.append(
            f"unknown field {', '.join(unknown)}; there are {', '.join(_QUESTION_FIELDS)} (with the "
            'format "vqa", other fields are metadata)'
        )
    if record.get("kind") == "all":
        problems.append('kind "all" means the questions of every kind; choose another name')
    if not isinstance(record.setdefault("kind", "question"), str):
        problems.append(f"kind must be a text, got {record['kind']!r:.80}")
    answer = _answers(record, "answer", problems)
    return _turns(_text(record, "question", problems), answer)


def vqa_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take ``question`` or ``context``, and ``answers`` or ``answer``, out of a record.

    The first of several answers is learned; ``answers`` in the metadata has all of them.
    """
    if "context" in record and "question" in record:
        problems.append("there are both question and context; keep one, with all of the text")
    context = _text(record, "context" if "context" in record else "question", problems)
    answers = _answers(record, "answers" if "answers" in record else "answer", problems)
    if answers:
        record["answers"] = answers
    return _turns(context, answers)


def caption_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take ``caption`` out of a record: the answer to an image alone."""
    return [Turn("user", []), Turn("assistant", [_text(record, "caption", problems)])]


def texts_turns(record: dict[str, Any], root: Path, problems: list[str]) -> list[Turn]:
    """Take the turns of ``{"texts": [{"user", "assistant", "source"}, ...]}`` out of a record."""
    texts = record.pop("texts", None)
    if not isinstance(texts, list) or not all(isinstance(text, Mapping) for text in texts):
        problems.append(f"texts must be a list of objects with user and assistant, got {texts!r:.80}")
        return []
    turns, sources = [], []
    for number, given in enumerate(texts, 1):
        text = {key: value for key, value in given.items() if value is not None}
        missing = [role for role in ("user", "assistant") if not isinstance(text.get(role), str)]
        if missing:
            problems.append(f"text {number} needs {' and '.join(missing)} as texts, got {given!r:.80}")
            continue
        turns.append(Turn("user", split_tags(text["user"])))
        turns.append(Turn("assistant", split_tags(text["assistant"])))
        sources.append(text.get("source"))
    if "source" not in record and len(set(map(str, sources))) == 1 and sources[0] is not None:
        record["source"] = sources[0]
    return turns


def _text(record: dict[str, Any], field: str, problems: list[str]) -> str:
    text = record.pop(field, "")
    if not isinstance(text, str):
        problems.append(f"{field} must be a text, got {text!r:.80}")
        return ""
    if not text:
        problems.append(f"the field {field} is missing")
    return text


def _answers(record: dict[str, Any], field: str, problems: list[str]) -> list[str]:
    """Take a text, or a list of texts, out of a record; VQAv2 has objects with the text ``answer``."""
    given = record.pop(field, [])
    answers = [given] if isinstance(given, str) else given
    several = field == "answers"
    if several and isinstance(answers, list):
        answers = [each.get("answer") if isinstance(each, Mapping) else each for each in answers]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        problems.append(f"{field} must be a text{' or a list of texts' * several}, got {given!r:.80}")
        return []
    return answers


def _turns(question: str, answers: list[str]) -> list[Turn]:
    turns = [Turn("user", split_tags(question))]
    return [*turns, Turn("assistant", split_tags(answers[0]))] if answers else turns
