"""Samples as a configuration names them: a path, or a list of paths with options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers.mixture import Mixture
from torchfuse.data.readers.read import read_samples
from torchfuse.errors import ConfigError, DataError

__all__ = ["read_mixture"]

_KEYS: Final = ("path", "format", "weight", "image_root")


def read_mixture(
    data: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    *,
    seed: int = 0,
    what: str = "data",
) -> Mixture:
    """Open the samples that a configuration names.

    Args:
        data: a path, ``{"path", "format", "weight", "image_root"}`` with the last three optional, or a
            list of these. See ``read_samples`` and ``Mixture``.
        seed: of the order.
        what: the name of the section, for messages.

    Raises:
        ConfigError: naming each key that is unknown, missing or of the wrong type, and for weights that
            are not above 0 or given for some sets only.
        DataError: with the problems of all files that cannot be opened.
    """
    entries = data if isinstance(data, Sequence) and not isinstance(data, str) else [data]
    given: list[dict[str, Any]] = [
        dict(entry) if isinstance(entry, Mapping) else {"path": entry} for entry in entries
    ]
    problems = []
    for number, entry in enumerate(given):
        name = f"{what}[{number}]" if entries is data else what
        problems += [f"{name}: {problem}" for problem in _problems(entry)]
    if problems or not given:
        raise ConfigError("; ".join(problems) or f"{what} names no file.")
    parts, unreadable = [], []
    for entry in given:
        weight = entry.pop("weight", None)
        options = {key: value for key, value in entry.items() if value is not None}
        try:
            parts.append((read_samples(options.pop("path"), **options), weight))
        except DataError as error:
            unreadable.append(str(error))
    if unreadable:
        raise DataError("\n".join(unreadable))
    return Mixture(parts, seed=seed)


def _problems(entry: Mapping[str, Any]) -> list[str]:
    problems = []
    if unknown := sorted(map(str, set(entry) - set(_KEYS))):
        problems.append(f"unknown key {', '.join(unknown)}; there are {', '.join(_KEYS)}")
    if not isinstance(entry.get("path"), str | Path) or not str(entry["path"]):
        problems.append(f"path must be the path of a file, got {entry.get('path')!r}")
    for name, kinds in (("format", str), ("image_root", str | Path), ("weight", int | float)):
        value = entry.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            problems.append(f"{name} cannot be {value!r}")
    return problems
