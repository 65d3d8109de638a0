"""Components: functions and classes that a configuration names by their dotted path."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from torchfuse.errors import ConfigError, ModelError
from torchfuse.options import call_with_options

__all__ = ["build", "resolve"]


def resolve(path: Any, *, what: str) -> Any:
    """Return the function or class of a dotted path.

    Args:
        path: the dotted path.
        what: the name of the section, for messages.

    Raises:
        ConfigError: if it is no dotted path, or there is no such component.
    """
    if not isinstance(path, str):
        raise ConfigError(f"{what} must name its _component_, a dotted path; got {path!r}.")
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what}: there is no component {path!r} ({error}).") from error


def build(section: Any, *args: Any, what: str, kind: type = object) -> Any:
    """Call the component that a section of a configuration names with the other keys of the section.

    Args:
        section: ``_component_``, the dotted path of a function or class, and its keywords.
        *args: positional arguments that the recipe adds.
        what: the name of the section, for messages.
        kind: the type that the component must return.

    Raises:
        ConfigError: if there is no such component, it does not take the keywords or their values, or
            it returns another type.
    """
    options = dict(section) if isinstance(section, Mapping) else {"_component_": section}
    path = options.pop("_component_", None)
    component = resolve(path, what=what)
    try:
        built = call_with_options(component, *args, what=f"{what} ({path})", options=options)
    except ModelError as error:  # the keywords of a section are a matter of configuration
        raise ConfigError(f"{what} ({path}): {error}") from error
    if not isinstance(built, kind):
        raise ConfigError(
            f"{what} ({path}) must return a {kind.__name__}, got a {type(built).__name__}."
        )
    return built
