"""Key tables: names in a foreign checkpoint and names in a module, converted in both directions.

A table is data: the source key (in the checkpoint), the target key (in the module), and where the values
are laid out differently, how to convert them. Reading and writing use the same rows, so whatever can be
read can also be written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from torch import Tensor

__all__ = ["SAME_NAMES", "Entry", "IndexMap", "KeyTable", "Layout"]

_INDEX = r"(0|[1-9][0-9]{0,8})"


@dataclass(frozen=True)
class Layout:
    """A conversion of values between the checkpoint's layout and the module's, exact both ways.

    Attributes:
        to_target: converts a tensor of the checkpoint. The result may be a view whose first axes are
            still to be flattened into one, so that reading needs no extra memory.
        to_source: converts a tensor of the module; a ``ValueError`` where the checkpoint's layout cannot
            represent the values.
        always_representable: whether ``to_source`` never raises.
    """

    to_target: Callable[[Tensor], Tensor]
    to_source: Callable[[Tensor], Tensor]
    always_representable: bool = True


@dataclass(frozen=True)
class IndexMap:
    """A conversion of the layer index in a key; None: the entry does not apply to this index."""

    to_target: Callable[[int], int | None]
    to_source: Callable[[int], int | None]

    @classmethod
    def from_pairs(cls, to_target: Mapping[int, int]) -> IndexMap:
        """Make a map from source indices to target indices."""
        return cls(to_target.get, {target: source for source, target in to_target.items()}.get)


@dataclass(frozen=True)
class Entry:
    """One row: a key, or the same key of all layers.

    Attributes:
        source_key: the checkpoint's key, with one ``{}`` for a layer index or ``*`` for any text.
        target_key: the module's key, with the same placeholder.
        layout: None where values are laid out alike.
        index_map: None where layers are numbered alike.
    """

    source_key: str
    target_key: str
    layout: Layout | None = None
    index_map: IndexMap | None = None

    def with_prefix(self, source: str, target: str) -> Entry:
        """Return the entry for a part of something larger."""
        return replace(self, source_key=source + self.source_key, target_key=target + self.target_key)


@dataclass(frozen=True)
class KeyTable:
    """All keys of one kind of checkpoint.

    Attributes:
        entries: the rows; the first that matches a key applies.
        aliases: pairs of source key prefixes: the first is replaced by the second, which is the one in
            ``entries``. Each is tried once, in order.
        ignored: patterns of source keys that are not loaded, such as computed buffers; full matches.
        tied: target keys that a checkpoint may tie to another target key.
        appended: target keys whose rows follow, in one tensor of the checkpoint, the rows of another
            target key.
    """

    entries: tuple[Entry, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    appended: Mapping[str, str] = field(default_factory=dict)

    def with_prefix(self, source: str, target: str) -> KeyTable:
        """Return the table for a part of something larger, whose keys have these prefixes."""
        return KeyTable(
            tuple(entry.with_prefix(source, target) for entry in self.entries),
            tuple((source + alias, source + prefix) for alias, prefix in self.aliases),
            tuple(re.escape(source) + pattern for pattern in self.ignored),
            {target + name: target + origin for name, origin in self.tied.items()},
            {target + name: target + origin for name, origin in self.appended.items()},
        )

    def with_aliases(self, *aliases: tuple[str, str]) -> KeyTable:
        """Return the table with more aliases, which are tried before the present ones."""
        return replace(self, aliases=aliases + self.aliases)

    def __add__(self, other: KeyTable) -> KeyTable:
        return KeyTable(
            self.entries + other.entries,
            self.aliases + other.aliases,
            self.ignored + other.ignored,
            {**self.tied, **other.tied},
            {**self.appended, **other.appended},
        )

    @cached_property
    def _source_patterns(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [(_pattern(entry.source_key), entry) for entry in self.entries]

    @cached_property
    def _target_patterns(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [(_pattern(entry.target_key), entry) for entry in self.entries]

    def to_targets(self, keys: Iterable[str]) -> tuple[dict[str, tuple[str, Layout | None]], list[str]]:
        """Translate the keys of a checkpoint.

        Returns:
            For each target key its source key and layout, and the source keys that match nothing, or a
            target key that another one has already.
        """
        found: dict[str, tuple[str, Layout | None]] = {}
        unknown = []
        for key in keys:
            plain = self._without_alias(key)
            target, layout = _translate(
                plain, self._source_patterns, lambda e: e.target_key, lambda m: m.to_target
            )
            if target is not None and target not in found:
                found[target] = (key, layout)
            elif target is not None or not any(re.fullmatch(p, plain) for p in self.ignored):
                unknown.append(key)
        return found, unknown

    def to_source(self, name: str) -> tuple[str, Layout | None] | None:
        """Return the source key and layout for a target key; None if there is none."""
        source, layout = _translate(
            name, self._target_patterns, lambda e: e.source_key, lambda m: m.to_source
        )
        return None if source is None else (source, layout)

    def _without_alias(self, key: str) -> str:
        for alias, prefix in self.aliases:
            if key.startswith(alias):
                key = prefix + key.removeprefix(alias)
        return key


SAME_NAMES: Final = KeyTable((Entry("*", "*"),))
"""The table of a format that has the module's own keys."""


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{\}", _INDEX).replace(r"\*", "(.+)"), re.DOTALL)


def _translate(
    name: str,
    patterns: list[tuple[re.Pattern[str], Entry]],
    template_of: Callable[[Entry], str],
    direction: Callable[[IndexMap], Callable[[int], int | None]],
) -> tuple[str | None, Layout | None]:
    for pattern, entry in patterns:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not match.groups():
            return template_of(entry), entry.layout
        if "*" in entry.source_key:
            return template_of(entry).replace("*", match[1]), entry.layout
        index: int | None = int(match[1])
        if entry.index_map is not None:
            assert index is not None
            index = direction(entry.index_map)(index)
        if index is not None:
            return template_of(entry).format(index), entry.layout
    return None, None
