"""What recipes share: a typed configuration, components by name, and one clear sentence on failure."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchfuse.options import call_with_options

__all__ = ["build", "recipe", "typed"]

_Schema = TypeVar("_Schema")


def typed(given: DictConfig, schema: type[_Schema]) -> _Schema:
    """Turn a parsed YAML into an instance of a dataclass.

    Args:
        given: what the YAML and the command line say.
        schema: a dataclass; fields without a value must be given, nested dataclasses are sections.

    Raises:
        ValueError: naming the key that does not exist, is missing or has a value of the wrong type.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        first = str(error.msg or error).splitlines()[0]
        section = _section(schema, str(key).split(".")[:-1])
        there = f" There are {', '.join(f.name for f in fields(section))}." if section else ""
        raise ValueError(f"Configuration key {key!r}: {first}.{there}") from error


def _section(schema: Any, path: list[str]) -> Any:
    """The dataclass that the last part of a dotted key belongs to, if there is one."""
    for name in path:
        kinds = {f.name: f.default_factory for f in fields(schema)}
        schema = kinds.get(name)
        if not (isinstance(schema, type) and is_dataclass(schema)):
            return None
    return schema


def build(section: Mapping[str, Any], *args: Any, what: str) -> Any:
    """Call the component that a section of a configuration names with the rest of the section.

    Args:
        section: ``_component_``, a dotted path, and keywords for what stands there.
        *args: positional arguments that the recipe adds.
        what: the name of the section, for messages.

    Raises:
        ValueError: if there is no such component, or it does not take the keywords.
    """
    options = dict(section)
    path = options.pop("_component_", None)
    if not isinstance(path, str):
        raise ValueError(f"{what} must name its _component_, a dotted path; it has {sorted(options)}.")
    try:
        component = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{what}: there is no component {path!r} ({error}).") from error
    return call_with_options(component, *args, what=f"{what} ({path})", options=options)


def recipe(schema: type[_Schema]) -> Callable[[Callable[[_Schema], None]], Callable[[], None]]:
    """Make a function of a typed configuration the main of a recipe for ``tune run``.

    What the caller got wrong ends it with one sentence and exit code 1; everything else keeps its
    traceback.
    """

    def decorate(main: Callable[[_Schema], None]) -> Callable[[], None]:
        def run() -> None:
            from torchtune import config

            @config.parse  # type: ignore[untyped-decorator, unused-ignore]
            def parsed(given: DictConfig) -> None:
                main(typed(given, schema))

            sys.path.append(os.getcwd())  # components of the user's own, as torchtune allows them
            try:
                parsed()
            except (ValueError, FileNotFoundError, OmegaConfBaseException) as error:
                if os.environ.get("TORCHFUSE_TRACEBACK"):
                    raise
                sys.stdout.flush()
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)

        run.__doc__ = main.__doc__
        return run

    return decorate
