"""The registry of formats: which one a checkpoint is in, and which can hold a module.

A format is one class with ``register_format`` on it. Those that come with torchfuse are registered when
the package ``torchfuse.checkpoint.formats`` is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

from torch import nn

from torchfuse.checkpoint.formats.spec import ModelSpec, Spec
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.io.directory import Checkpoint
from torchfuse.models.base import FusedModel
from torchfuse.naming import unwrap

__all__ = [
    "Role",
    "find_format",
    "formats_of",
    "read_model_spec",
    "read_part",
    "read_spec",
    "register_format",
    "spec_to_export",
]

Role = Literal["decoder", "encoder", "model"]

_FORMATS: Final[dict[Role, list[type[Spec]]]] = {"decoder": [], "encoder": [], "model": []}
_SpecType = TypeVar("_SpecType", bound="type[Spec]")


def register_format(role: Role) -> Callable[[_SpecType], _SpecType]:
    """Register a format, as a class decorator.

    Args:
        role: what its checkpoints hold: a decoder, an encoder or a whole fused model.
    """

    def register(format_: _SpecType) -> _SpecType:
        _FORMATS[role].append(format_)
        # A format without model types of its own takes any, so it is tried last.
        _FORMATS[role].sort(key=lambda other: (not other.model_types, other.name))
        return format_

    return register


def formats_of(role: Role) -> Sequence[type[Spec]]:
    """Return the formats of a role, in the order in which they are tried."""
    return tuple(_FORMATS[role])


def find_format(module: nn.Module, formats: Sequence[type[Spec]]) -> type[Spec]:
    """Return the format that a module can be saved in.

    Raises:
        CheckpointError: if there is none among them.
    """
    inner = unwrap(module)
    for format_ in formats:
        if format_.matches_module(inner):
            return format_
    raise CheckpointError(
        f"no format for a {type(inner).__name__}, only {', '.join(format_.name for format_ in formats)}"
    )


def read_part(
    module: nn.Module, formats: Sequence[type[Spec]], what: str, problems: list[str]
) -> Spec | None:
    """Read the settings of a part of a model.

    Args:
        module: the part.
        formats: those that it may be in.
        what: what it is, for messages.
        problems: the reason is added here if the part has no settings.
    """
    try:
        return find_format(module, formats).from_module(unwrap(module))
    except ValueError as error:
        problems.append(f"{what}: {error}")
        return None


def read_spec(config: Mapping[str, Any], formats: Sequence[type[Spec]]) -> Spec:
    """Read the settings in a ``config.json``.

    Raises:
        CheckpointError: for an unknown ``model_type``, or a setting that is missing, wrong or not
            supported.
    """
    for format_ in formats:
        if format_.matches_config(config):
            return format_.from_config(config)
    known = ", ".join(sorted(kind for format_ in formats for kind in format_.model_types))
    raise CheckpointError(
        f"config.json: model_type {config.get('model_type')!r} is not supported, only {known}."
    )


def read_model_spec(checkpoint: Checkpoint, model: nn.Module | None = None) -> ModelSpec:
    """Read the settings of a checkpoint of a whole model.

    Args:
        checkpoint: the checkpoint.
        model: the model that it is loaded into, if that is built already; needed for a file without a
            configuration.

    Raises:
        CheckpointError: as ``read_spec``, and if the model is needed and not given.
    """
    formats = [format_ for format_ in formats_of("model") if issubclass(format_, ModelSpec)]
    # Keys first: beside a file of torchtune's there may be the config.json of another checkpoint.
    recognized = (format_.from_keys(checkpoint, model) for format_ in formats)
    spec = next(filter(None, recognized), None) or read_spec(checkpoint.config, formats)
    assert isinstance(spec, ModelSpec)
    return spec


def spec_to_export(name: str, module: nn.Module) -> Spec:
    """Return the settings of a checkpoint of a model, or of a part of one, in a format by name.

    Raises:
        ConfigError: for an unknown name.
        CheckpointError: for a module that the format cannot hold: what in it, and the formats that can.
    """
    inner = unwrap(module)
    whole = isinstance(inner, FusedModel)
    known = formats_of("model") if whole else (*formats_of("decoder"), *formats_of("encoder"))
    formats = {format_.name: format_ for format_ in known if format_.can_export}
    if name not in formats:
        raise ConfigError(
            f"Unknown format {name!r} for {'a fused model' if whole else 'a part'}; there are "
            f"{', '.join(formats)}."
        )
    try:
        return formats[name].from_module(inner).for_export(inner)
    except ValueError as error:
        others = [other for other in formats if other != name and _can_hold(formats[other], inner)]
        hint = f"Formats that can: {', '.join(others)}." if others else "No format here can."
        raise CheckpointError(f"{error} {hint}") from error


def _can_hold(format_: type[Spec], module: nn.Module) -> bool:
    try:
        format_.from_module(module)
    except ValueError:
        return False
    return True
