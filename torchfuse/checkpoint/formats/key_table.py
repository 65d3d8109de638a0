"""Foreign names and ours, as a table; one converter for all of them, in both directions.

A table is data: their name, our name, and where values are laid out otherwise, how. Reading a
checkpoint and writing one use the same rows, so that what comes in can go out again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

from torch import Tensor

__all__ = ["SAME_NAMES", "Entry", "KeyTable", "Layout", "Numbers"]

_NUMBER = r"(0|[1-9][0-9]{0,8})"


@dataclass(frozen=True)
class Layout:
    """How values are laid out there.

    Attributes:
        read: makes theirs ours, exactly. The result may be a view whose first axes are yet to be
            flattened into one, so that reading needs no memory of its own.
        write: makes ours theirs, exactly; where theirs cannot hold all of ours, a ``ValueError``.
        holds_all: whether theirs can hold all that ours can.
    """

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]
    holds_all: bool = True


@dataclass(frozen=True)
class Numbers:
    """How the number in their name becomes the number in ours, and back; None: not of this kind."""

    read: Callable[[int], int | None]
    write: Callable[[int], int | None]


@dataclass(frozen=True)
class Entry:
    """One kind of name.

    Attributes:
        theirs: their name, with ``{}`` for one number at most, or ``*`` for anything.
        ours: our name, with the same.
        layout: None where values are laid out as ours are.
        numbers: None where both count alike.
    """

    theirs: str
    ours: str
    layout: Layout | None = None
    numbers: Numbers | None = None

    def under(self, theirs: str, ours: str) -> Entry:
        """The same entry for a part of something larger."""
        return replace(self, theirs=theirs + self.theirs, ours=ours + self.ours)


@dataclass(frozen=True)
class KeyTable:
    """All names of one kind of checkpoint.

    Attributes:
        entries: the first that fits a name counts.
        spellings: beginnings of their names that mean another beginning, the one in ``entries``. Each is
            tried once, in order.
        ignored: patterns of names that are of no use to us, which they must match whole.
        tied: our names that may be taken from another of our names where a checkpoint ties them.
        appended: our names of rows that stand, in the same tensor of theirs, behind those of another of
            our names.
    """

    entries: tuple[Entry, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    appended: Mapping[str, str] = field(default_factory=dict)

    def under(self, theirs: str, ours: str) -> KeyTable:
        """The same table for a part of something larger, whose names begin with these."""
        return KeyTable(
            tuple(entry.under(theirs, ours) for entry in self.entries),
            tuple((theirs + there, theirs + here) for there, here in self.spellings),
            tuple(re.escape(theirs) + pattern for pattern in self.ignored),
            {ours + name: ours + origin for name, origin in self.tied.items()},
            {ours + name: ours + origin for name, origin in self.appended.items()},
        )

    def __add__(self, other: KeyTable) -> KeyTable:
        return KeyTable(
            self.entries + other.entries,
            self.spellings + other.spellings,
            self.ignored + other.ignored,
            {**self.tied, **other.tied},
            {**self.appended, **other.appended},
        )

    def spelled(self, *spellings: tuple[str, str]) -> KeyTable:
        """The same table, in which these spellings are known, too; they are tried first."""
        return replace(self, spellings=spellings + self.spellings)

    @cached_property
    def _read(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [(_pattern(entry.theirs), entry) for entry in self.entries]

    @cached_property
    def _write(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [(_pattern(entry.ours), entry) for entry in self.entries]

    def read(self, keys: Iterable[str]) -> tuple[dict[str, tuple[str, Layout | None]], list[str]]:
        """Translate their names.

        Returns:
            For each of our names their name and layout, and the names that nothing here knows (a second
            name for one of ours among them).
        """
        found: dict[str, tuple[str, Layout | None]] = {}
        unknown = []
        for key in keys:
            plain = self._plain(key)
            ours, layout = _translate(plain, self._read, lambda e: e.ours, lambda n: n.read)
            if ours is not None and ours not in found:
                found[ours] = (key, layout)
            elif ours is not None or not any(re.fullmatch(p, plain) for p in self.ignored):
                unknown.append(key)
        return found, unknown

    def write(self, name: str) -> tuple[str, Layout | None] | None:
        """Their name and layout for one of our names; None where they have none."""
        theirs, layout = _translate(name, self._write, lambda e: e.theirs, lambda n: n.write)
        return None if theirs is None else (theirs, layout)

    def _plain(self, key: str) -> str:
        for there, here in self.spellings:
            if key.startswith(there):
                key = here + key.removeprefix(there)
        return key


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    return re.compile(escaped.replace(r"\{\}", _NUMBER).replace(r"\*", "(.+)"), re.DOTALL)


SAME_NAMES: Final = KeyTable((Entry("*", "*"),))
"""The table of a format that has our names."""


def _translate(
    name: str,
    patterns: list[tuple[re.Pattern[str], Entry]],
    target: Callable[[Entry], str],
    direction: Callable[[Numbers], Callable[[int], int | None]],
) -> tuple[str | None, Layout | None]:
    for pattern, entry in patterns:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not match.groups():
            return target(entry), entry.layout
        if "*" in entry.theirs:
            return target(entry).replace("*", match[1]), entry.layout
        number: int | None = int(match[1])
        if entry.numbers is not None:
            assert number is not None
            number = direction(entry.numbers)(number)
        if number is not None:
            return target(entry).format(number), entry.layout
    return None, None
