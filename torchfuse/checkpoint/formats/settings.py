"""Typed reader for a checkpoint's configuration, which collects all problems into one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from torchfuse.errors import CheckpointError

__all__ = ["Settings"]

_LARGEST: Final = 2**40
_T = TypeVar("_T")


class Settings:
    """A section of a ``config.json``.

    Every method returns a value of the right type: the one in the file, its default, or, after noting a
    problem, a placeholder. ``raise_problems`` then raises all of them at once. A null value counts as
    missing.

    Args:
        values: the section.
        what: what it configures, for messages.
        file: name of the file, for messages.

    Examples:
        >>> settings = Settings({"hidden_size": 24, "attention_bias": True}, "llama")
        >>> settings.count("hidden_size")
        24
        >>> settings.allow_only("attention_bias", False)
        >>> settings.raise_problems()
        Traceback (most recent call last):
        torchfuse.errors.CheckpointError: llama: config.json: attention_bias=True is not supported, ...
    """

    def __init__(self, values: Mapping[str, Any], what: str, file: str = "config.json") -> None:
        self.values = values
        self.problems: list[str] = []
        self._what, self._file = what, file
        self._prefix = ""

    def section(self, key: str) -> Settings:
        """Return a nested section, which shares the list of problems."""
        values = self._checked(key, None, lambda value: isinstance(value, Mapping), "a section", {})
        inner = Settings(values, self._what, self._file)
        inner._prefix = f"{self._prefix}{key}."
        inner.problems = self.problems
        return inner

    def raise_problems(self) -> None:
        """Raise one ``CheckpointError`` with all problems, if there are any."""
        if self.problems:
            raise CheckpointError(f"{self._what}: {self._file}: {'; '.join(self.problems)}.")

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return an integer of at least ``least``."""
        return self._checked(
            key,
            default,
            lambda value: type(value) is int and least <= value <= _LARGEST,
            f"a whole number of at least {least}",
            max(least, 1),
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number."""
        return float(
            self._checked(
                key,
                default,
                lambda value: type(value) in (int, float) and 0 < value < math.inf,
                "a number above 0",
                1.0,
            )
        )

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        return self._checked(key, default, lambda value: type(value) is bool, "true or false", False)

    def choice(self, key: str, choices: Mapping[str, _T], default: str | None = None) -> _T:
        """Return the value that a name is mapped to."""
        name = self._checked(
            key,
            default,
            lambda value: isinstance(value, str) and value in choices,
            f"one of {', '.join(choices)}",
            next(iter(choices)),
        )
        return choices[name]

    def counts(self, key: str, default: Sequence[int] | None = None, *, least: int = 0) -> list[int]:
        """Return a list of integers of at least ``least``."""
        return list(
            self._checked(
                key,
                default,
                lambda value: (
                    isinstance(value, list) and all(type(n) is int and least <= n for n in value)
                ),
                f"a list of whole numbers of at least {least}",
                [],
            )
        )

    def sections(self, key: str) -> dict[str, Mapping[str, Any]]:
        """Return sections by name."""
        return dict(
            self._checked(
                key,
                None,
                lambda value: (
                    isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())
                ),
                "sections by name",
                {},
            )
        )

    def allow_only(self, key: str, only: Any) -> None:
        """Note a problem if a setting is present with any other value than the supported one."""
        value = self.values.get(key)
        if value is not None and value != only:
            self.problems.append(f"{self._prefix}{key}={value!r} is not supported, only {only!r}")

    def _checked(
        self, key: str, default: Any, fits: Callable[[Any], bool], expected: str, placeholder: Any
    ) -> Any:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if fits(value):
            return value
        text = repr(value)
        shown = text if len(text) <= 80 else text[:77] + "..."
        problem = "is missing" if value is None else f"must be {expected}, got {shown}"
        self.problems.append(f"{self._prefix}{key} {problem}")
        return placeholder
