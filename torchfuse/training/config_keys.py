"""The keys of a configuration, described by its dataclasses.

A dataclass says what its fields mean in the section ``Attributes:`` of its docstring. ``--help`` of a
recipe and the page of all configurations both print what is read here.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, Final

import yaml
from omegaconf import MISSING

__all__ = ["ConfigKey", "attributes_of", "config_keys", "keys_as_text"]

_WORDS: Final = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    dict: "section",
    types.NoneType: "null",
}
_ENTRY: Final = re.compile(r"    (\w+)(?: \((.*?)\))?: (.*)")


@dataclass(frozen=True)
class ConfigKey:
    """A key of a configuration.

    Attributes:
        name: dotted, with the sections it is in.
        type: its type in words.
        default: its default as YAML; None where it must be given.
        meaning: a phrase, without a period at its end.
        is_section: whether it holds keys that follow it.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    is_section: bool = False


def config_keys(schema: type, prefix: str = "") -> Iterator[ConfigKey]:
    """Iterate over the keys of a configuration, each section in front of its keys.

    Args:
        schema: a dataclass, see ``typed``.
        prefix: the dotted name of the section, with a dot at its end.

    Examples:
        >>> @dataclass
        ... class Train:
        ...     '''Optimisation.
        ...
        ...     Attributes:
        ...         lr: the learning rate.
        ...         max_steps: the most steps.
        ...     '''
        ...
        ...     lr: float
        ...     max_steps: int | None = None
        >>> for key in config_keys(Train, "train."):
        ...     print(key.name, "|", key.type, "|", key.default, "|", key.meaning)
        train.lr | number | None | the learning rate
        train.max_steps | integer or null | null | the most steps
    """
    hints, described = typing.get_type_hints(schema), attributes_of(schema)
    for field in fields(schema):
        words, meaning = described.get(field.name, (None, ""))
        name, hint = prefix + field.name, hints[field.name]
        section = is_dataclass(hint)
        yield ConfigKey(name, words or _in_words(hint), _default(field), meaning, section)
        if section:
            yield from config_keys(hint, f"{name}.")


def keys_as_text(schema: type) -> str:
    """Return a list of the keys of a configuration for the terminal."""
    lines = ["keys of the configuration:"]
    for key in config_keys(schema):
        default = "required" if key.default is None else key.default
        notes = key.type if key.is_section else f"{key.type}; {default}"
        lines += textwrap.wrap(f"{key.name} ({notes})", 96, initial_indent="  ")
        indent = " " * 8
        meaning = key.meaning.replace("``", "")
        lines += textwrap.wrap(meaning, 96, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def attributes_of(schema: type) -> dict[str, tuple[str | None, str]]:
    """Return what the docstrings of a dataclass and its bases say of each field.

    Returns:
        By name, the words for its type, if the entry has some in parentheses, and its meaning.
    """
    found: dict[str, tuple[str | None, str]] = {}
    for base in reversed(schema.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        _, _, section = text.partition("\nAttributes:\n")
        section = re.split(r"\n(?=\S)", section)[0]
        joined = re.sub(r"\n {8,}", " ", section)  # an entry with the lines that continue it
        entries = map(_ENTRY.fullmatch, joined.splitlines())
        found |= {entry[1]: (entry[2], entry[3].rstrip(".")) for entry in entries if entry}
    return found


def _in_words(hint: Any, plural: bool = False) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(kind, plural) for kind in hint.__args__)
    if typing.get_origin(hint) is list:
        return f"list of {_in_words(typing.get_args(hint)[0], plural=True)}"
    word = "section" if is_dataclass(hint) else _WORDS.get(typing.get_origin(hint) or hint, "any value")
    return f"{word}s" if plural else word


def _default(field: Field[Any]) -> str | None:
    """Return the default of a field as YAML; None where it must be given."""
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    if value is NO_DEFAULT or value == MISSING:
        return None
    if is_dataclass(value):
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
