"""Reading a checkpoint's configuration: what it must say, and all that is wrong with it at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from torchfuse.errors import CheckpointError

__all__ = ["Settings"]

_LARGEST: Final = 2**40
_T = TypeVar("_T")


class Settings:
    """A section of a ``config.json``.

    Every question gets an answer of the right type; ``done`` raises if one of them was made up. A key
    that is null is one that is missing.

    Args:
        values: the section.
        what: what it configures, for the message.
        file: the file that it is from, for the message.

    Examples:
        >>> settings = Settings({"hidden_size": 24, "attention_bias": True}, "Llama")
        >>> settings.count("hidden_size")
        24
        >>> settings.refuse_unless("attention_bias", False)
        >>> settings.done()
        Traceback (most recent call last):
        torchfuse.errors.CheckpointError: Llama: config.json: attention_bias=True cannot ...
    """

    def __init__(self, values: Mapping[str, Any], what: str, file: str = "config.json") -> None:
        self._values = values
        self._what, self._file = what, file
        self._prefix = ""
        self._problems: list[str] = []

    def section(self, key: str) -> Settings:
        """A section inside this one; its problems are this one's."""
        value = self._values.get(key)
        if not isinstance(value, Mapping):
            self._wrong(key, "a section", value)
            value = {}
        inner = Settings(value, self._what, self._file)
        inner._prefix = f"{self._prefix}{key}."
        inner._problems = self._problems
        return inner

    @property
    def values(self) -> Mapping[str, Any]:
        """All that it says."""
        return self._values

    @property
    def problems(self) -> list[str]:
        """All that was wrong so far."""
        return list(self._problems)

    def problem(self, text: str) -> None:
        """Note what is wrong, for ``done``."""
        self._problems.append(text)

    def done(self) -> None:
        """Raise one ``ValueError`` with all that was wrong."""
        if self._problems:
            raise CheckpointError(f"{self._what}: {self._file}: {'; '.join(self._problems)}.")

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        fits = type(value) is int and least <= value <= _LARGEST
        if not fits:
            self._wrong(key, f"a whole number of at least {least}", value)
        return value if fits else max(least, 1)  # type: ignore[return-value]

    def number(self, key: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        fits = type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]
        if not fits:
            self._wrong(key, "a number above 0", value)
        return float(value) if fits else 1.0  # type: ignore[arg-type]

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not bool:
            self._wrong(key, "true or false", value)
        return value is True

    def choice(self, key: str, choices: Mapping[str, _T], default: str | None = None) -> _T:
        """What a name stands for."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            self._wrong(key, f"one of {', '.join(choices)}", value)
            return next(iter(choices.values()))
        return choices[value]

    def counts(self, key: str, default: Sequence[int] | None = None, *, least: int = 0) -> list[int]:
        """Whole numbers."""
        value = self._values.get(key)
        if value is None and default is not None:
            return list(default)
        fits = isinstance(value, list) and all(type(n) is int and least <= n for n in value)
        if not fits:
            self._wrong(key, f"a list of whole numbers of at least {least}", value)
        return list(value) if fits else []  # type: ignore[arg-type]

    def sections(self, key: str) -> dict[str, Mapping[str, Any]]:
        """Sections by name."""
        value = self._values.get(key)
        fits = isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())
        if not fits:
            self._wrong(key, "sections by name", value)
        return dict(value) if fits else {}  # type: ignore[arg-type]

    def refuse_unless(self, key: str, only: Any) -> None:
        """Refuse a setting that cannot be expressed, unless it is missing or has this value."""
        value = self._values.get(key)
        if value is not None and value != only:
            self.problem(f"{self._prefix}{key}={value!r} cannot be expressed here, only {only!r}")

    def _wrong(self, key: str, expected: str, value: Any) -> None:
        name = self._prefix + key
        text = repr(value)
        shown = text if len(text) <= 80 else text[:77] + "..."
        self.problem(
            f"{name} is missing" if value is None else f"{name} must be {expected}, got {shown}"
        )
