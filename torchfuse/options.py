"""Options by name: what a class or function takes, and a clear word about what it does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

__all__ = ["call_with_options"]

_Result = TypeVar("_Result")


def call_with_options(
    target: Callable[..., _Result], *args: Any, what: str, options: Mapping[str, Any]
) -> _Result:
    """Call ``target(*args, **options)`` after its signature has agreed.

    Args:
        target: a class or function.
        *args: positional arguments that the caller is sure of.
        what: what the options belong to, for the message.
        options: keywords from a user or a configuration.

    Raises:
        ValueError: naming every option that ``target`` does not take, every one it lacks, and those
            there are.

    Examples:
        >>> call_with_options(int, "ff", what="number", options={"base": 16})
        255
    """
    try:
        signature = inspect.signature(target)
    except ValueError:  # a builtin without one
        return target(*args, **options)
    parameters = list(signature.parameters.values())
    by_name = {
        p.name: p for p in parameters[len(args) :] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    faults = [f"unknown option {name!r}" for name in options if name not in by_name]
    if takes_anything:
        faults = []
    faults += [
        f"missing option {p.name!r}"
        for p in by_name.values()
        if p.default is p.empty and p.name not in options
    ]
    if faults:
        raise ValueError(f"{what}: {', '.join(faults)}; it takes {', '.join(by_name) or 'none'}.")
    return target(*args, **options)
