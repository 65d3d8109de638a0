"""Options by name, checked against the signature of the class or function that takes them.

``inspect.Signature.bind`` stops at the first problem and ignores annotations, and OmegaConf checks
structured configs, not signatures. Here all problems of all options are one error, before anything is
called.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    Never,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from torchfuse.errors import ConfigError

__all__ = ["call_with_options", "check_fields", "passes_options_to"]

_Result = TypeVar("_Result")
_Params = ParamSpec("_Params")

# Types that YAML has. Other values come from Python, where a type checker checks them.
_PLAIN: Final = (NoneType, bool, int, float, str, list, dict)
_WORDS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    NoneType: "null",
    **dict.fromkeys((Path, os.PathLike), "a path"),
    **dict.fromkeys((dict, Mapping), "a mapping"),
    **dict.fromkeys((list, tuple, Sequence), "a list"),
}


def call_with_options(
    target: Callable[..., _Result], *args: Any, what: str, options: Mapping[str, Any]
) -> _Result:
    """Call ``target(*args, **options)`` after a check of the options against its signature.

    Args:
        target: a class or function.
        *args: positional arguments, which are not checked.
        what: what the options belong to, for the message.
        options: keywords from a user or a configuration. Values of YAML's types must fit the
            annotations, where an integer is a number, a list a tuple and a string a path; other values
            pass, and so does any value of an annotation that is not a class.

    Raises:
        ConfigError: naming every option that ``target`` does not take, every one it lacks, and those
            there are; every value that does not fit, and what would; if ``target`` has no signature.

    Examples:
        >>> call_with_options(round, 1.618, what="number", options={"ndigits": 2})
        1.62
        >>> call_with_options(sorted, [2, 1], what="order", options={"revers": True})
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: order: unknown option 'revers'; it takes key, reverse.
    """
    parameters = list(_signature(target, what).parameters.values())
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    given, rest = {p.name for p in parameters[: len(args)]}, parameters[len(args) :]
    takes = {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    names, values = [], []
    for name, value in options.items():
        if name not in takes:
            if name in given or not takes_anything or not isinstance(name, str):
                names.append(f"unknown option {name!r}")
        elif takes[name].annotation is Never:
            values.append(
                f"{name} is fixed here{_at(takes[name].default)} and cannot be given, got {value!r}"
            )
        else:
            values += _problems(name, value, takes[name].annotation)
    free = [
        p for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.annotation is not Never
    ]
    names += [
        f"missing option {p.name!r}" for p in free if p.default is p.empty and p.name not in options
    ]
    if names:
        names = [", ".join(names), f"it takes {', '.join(p.name for p in free) or 'none'}"]
    if names or values:
        raise ConfigError(f"{what}: {'; '.join(names + values)}.")
    return target(*args, **options)


def check_fields(config: Any, what: str) -> None:
    """Check the values of a dataclass against its annotations, as ``call_with_options`` does.

    Args:
        config: an instance of the dataclass.
        what: its name in the message.

    Raises:
        ConfigError: naming every field whose value does not fit, the value, and what would.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Size:
        ...     width: int = 3
        ...     name: str | None = None
        >>> check_fields(Size("3", name=True), "size")
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: size: width must be an integer, got '3'; name must be ...
    """
    problems = [
        problem
        for name, expected in _field_types(type(config)).items()
        for problem in _problems(name, getattr(config, name), expected)
    ]
    if problems:
        raise ConfigError(f"{what}: {'; '.join(problems)}.")


def passes_options_to(
    target: Callable[..., Any], **fixed: Any
) -> Callable[[Callable[_Params, _Result]], Callable[_Params, _Result]]:
    """Check the ``**options`` of a function against the function that it passes them to.

    The function's signature gets the keywords of ``target`` in place of ``**options``, which
    ``functools.wraps`` and ``ParamSpec`` cannot express, and is checked at each call.

    Args:
        target: what the function calls with its ``**options``, and with positional arguments that it
            makes itself.
        **fixed: keywords that the function passes to ``target`` itself, and callers cannot.

    Examples:
        >>> @passes_options_to(sorted, reverse=True)
        ... def falling(numbers, **options):
        ...     return sorted(numbers, reverse=True, **options)
        >>> falling([1, 3, 2])
        [3, 2, 1]
        >>> falling([1, 3, 2], reverse=False)
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: falling: reverse is fixed here at True and cannot be ...
    """

    def decorate(function: Callable[_Params, _Result]) -> Callable[_Params, _Result]:
        own = inspect.signature(function, eval_str=True)
        parameters = {p.name: p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD}
        for p in inspect.signature(target, eval_str=True).parameters.values():
            if p.name in fixed or p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                default = fixed.get(p.name, p.default)
                p = p.replace(kind=p.KEYWORD_ONLY, annotation=Never, default=default)
            parameters.setdefault(p.name, p)
        function.__signature__ = own.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]

        @functools.wraps(function)
        def checked(*args: _Params.args, **options: _Params.kwargs) -> _Result:
            return call_with_options(function, *args, what=function.__name__, options=options)

        return checked

    return decorate


def _signature(target: Any, what: str) -> Signature:
    try:
        signature = inspect.signature(target, eval_str=True)
    except Exception:  # evaluating an annotation can raise anything; unevaluated, it fits any value
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{what} must be a function or class with a known signature, got {target!r}."
            ) from error
    if not (isinstance(target, type) and dataclasses.is_dataclass(target)):
        return signature
    types = _field_types(target)
    return signature.replace(
        parameters=[
            p.replace(annotation=types.get(p.name, p.annotation)) for p in signature.parameters.values()
        ]
    )


def _field_types(cls: Any) -> dict[str, Any]:
    """Return the types of a dataclass's fields, each evaluated in the module that annotates it."""
    try:
        hints = get_type_hints(cls, include_extras=True)
    except Exception:  # as in _signature
        hints = {}
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name in hints}


def _problems(name: str, value: Any, expected: Any) -> list[str]:
    return [] if _fits(value, expected) else [f"{name} must be {_words(expected)}, got {value!r}"]


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value fits a type; True where that cannot be decided."""
    origin, members = get_origin(expected), get_args(expected)
    if expected is Parameter.empty or origin is Annotated or not isinstance(value, _PLAIN):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return any(type(value) is type(member) and value == member for member in members)
    kind = NoneType if expected is None else origin or expected
    if isinstance(value, bool) and kind in (int, float):
        return False
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return isinstance(value, str)
    # A string is a sequence, too, but never a list of anything.
    accepted: Any = {float: (int, float), tuple: list, Sequence: list}.get(kind, kind)
    try:
        fits = isinstance(value, accepted)
    except TypeError:  # no class, but Any, a protocol, a type variable
        return True
    if not fits or not members or kind is tuple:
        return fits
    contents: Any = value.values() if isinstance(value, dict) else value
    return all(_fits(content, members[-1]) for content in contents)


def _words(expected: Any) -> str:
    """Return the name of a type in the terms of YAML."""
    origin, members = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType, Literal):
        *others, last = [repr(m) if origin is Literal else _words(m) for m in members]
        return f"{', '.join(others)} or {last}" if others else last
    kind = NoneType if expected is None else origin or expected
    words = _WORDS.get(kind) or str(getattr(kind, "__name__", kind))
    if origin in (dict, Mapping, list, Sequence) and members[-1] is not Any:
        return f"{words} (each {_words(members[-1])})"
    return words


def _at(default: Any) -> str:
    return "" if default is Parameter.empty else f" at {default!r}"
