"""Configurations of recipes: typed, with components by name, and one error for all problems.

Nothing here imports torchtune: a mistyped key is reported before the seconds that its import takes.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from torchfuse.errors import CheckpointError, ConfigError, DataError
from torchfuse.training.config_files import find_config
from torchfuse.training.config_keys import keys_as_text

__all__ = [
    "check_output_dir",
    "override",
    "read_config",
    "read_sections",
    "read_yaml",
    "recipe",
    "typed",
]

_Schema = TypeVar("_Schema")


def read_yaml(path: str | Path, hint: str, *, load: Callable[[TextIO], Any] = yaml.safe_load) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        hint: what kind of file is expected, for the message.
        load: reads the open file.

    Raises:
        ConfigError: if it cannot be read or is no YAML, naming it.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            return load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {hint}.") from error
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no YAML: {_one_line(error)}.") from error


def read_config(path: str | Path, hint: str) -> DictConfig:
    """Read a configuration: a YAML file of keys, none of them twice.

    Args:
        path: the file, or the name of an installed configuration, see ``find_config``.
        hint: what kind of file is expected, for the message.

    Raises:
        ConfigError: if the file cannot be read or holds anything else, naming it.
    """
    path = find_config(path)
    config = read_yaml(path, hint, load=OmegaConf.load)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} must hold keys with values, got a list: {hint}.")
    if wrong := [key for key in config if not isinstance(key, str)]:
        raise ConfigError(f"{path}: a key must be a string, got {wrong[0]!r}.")
    return config


def read_sections(path: str | Path, hint: str, *names: str) -> dict[str, Any]:
    """Read sections of a configuration with their interpolations resolved.

    Args:
        path: the file.
        hint: what kind of file is expected, for the message.
        *names: the sections; those that the file lacks are left out.

    Raises:
        ConfigError: as for ``read_config``, and naming a key whose interpolation cannot be resolved.
    """
    config = read_config(path, hint)
    try:
        sections = {name: config[name] for name in names if config.get(name) is not None}
        return {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in sections.items()
        }
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{path}: configuration key {error.full_key!r}: {_first_line(error)}."
        ) from error


def typed(given: DictConfig, schema: type[_Schema]) -> _Schema:
    """Turn a parsed YAML into an instance of a dataclass.

    Args:
        given: the YAML with the overrides of the command line.
        schema: a dataclass; fields without a value must be given, nested dataclasses are sections.

    Raises:
        ConfigError: naming every key that does not exist, is missing or has a value of the wrong type.
    """
    config = OmegaConf.structured(schema)
    problems = list(_merge(config, OmegaConf.to_container(given, resolve=False)))
    try:
        if not problems:
            return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # in an interpolation
        problems = [f"Configuration key {error.full_key!r}: {_first_line(error)}."]
    raise ConfigError(" ".join(problems))


def _merge(config: DictConfig, given: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Merge values into a structured configuration, and yield a sentence for each that does not fit."""
    for name in dict.fromkeys([*given, *config]):
        section = name in config and is_dataclass(OmegaConf.get_type(config, name))
        value = given.get(name, {} if section else MISSING)
        if section and isinstance(value, dict):
            yield from _merge(config[name], value, f"{prefix}{name}.")
            continue
        key = f"Configuration key {prefix + str(name)!r}"
        try:
            config.merge_with({name: value})
        except ConfigKeyError:
            yield f"{key}: unknown; there are {', '.join(config)}."
        except OmegaConfBaseException as error:
            if section:
                yield f"{key}: expected a section with {', '.join(config[name])}, got {value!r}."
            else:
                yield f"{key}: {_first_line(error)}."
        else:
            if OmegaConf.is_missing(config, name):
                yield f"{key}: missing, and must be given."


def check_output_dir(path: str | Path, *names: str) -> None:
    """Check that a directory can be written to, or made where there is none.

    Args:
        path: the ``output_dir`` of a configuration.
        *names: directories in it of which the same is true.

    Raises:
        ConfigError: if it cannot.
    """
    for folder in (Path(path), *(Path(path) / name for name in names)):
        existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigError(
                f"output_dir {path}: {existing} is not a directory that can be written to."
            )


def recipe(
    schema: type[_Schema], *, flags: Mapping[str, str] | None = None
) -> Callable[[Callable[[_Schema], None]], Callable[[], None]]:
    """Turn a function of a typed configuration into the main function of a recipe for ``tune run``.

    A ``ConfigError``, ``DataError`` or ``CheckpointError`` ends the recipe with one sentence on stderr
    and exit code 1. Any other exception keeps its traceback; with ``TORCHFUSE_TRACEBACK`` set in the
    environment, those three do too.

    Args:
        schema: the configuration, see ``typed``.
        flags: keys that ``--key`` on the command line sets to true, with a help text for each.
    """

    def decorate(main: Callable[[_Schema], None]) -> Callable[[], None]:
        def run() -> None:
            sys.path.append(os.getcwd())  # components of the user's own, as torchtune allows them
            try:
                main(typed(_parse_arguments(main.__doc__, schema, flags or {}), schema))
            except (ConfigError, DataError, CheckpointError) as error:
                if os.environ.get("TORCHFUSE_TRACEBACK"):
                    raise
                sys.stdout.flush()
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)

        run.__doc__ = main.__doc__
        return run

    return decorate


def _parse_arguments(description: str | None, schema: type, flags: Mapping[str, str]) -> DictConfig:
    """Parse ``--config`` and the overrides of the command line."""
    parser = ArgumentParser(
        usage="%(prog)s --config NAME_OR_FILE [key=value ...]",
        description=description,
        epilog=keys_as_text(schema),
        formatter_class=RawDescriptionHelpFormatter,
    )
    what = "an installed configuration (torchfuse ls) or a YAML file; key=value overrides a key of it"
    parser.add_argument("--config", required=True, help=what)
    for flag, does in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=does)
    arguments, overrides = parser.parse_known_args()
    overrides += [f"{flag}=true" for flag in flags if getattr(arguments, flag)]
    return override(read_config(arguments.config, "--config takes the YAML of a recipe"), overrides)


def override(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return a configuration with the overrides of a command line, by torchtune's rules.

    ``key=value`` sets a key, also one whose name has dots; ``section=path`` sets the ``_component_`` of
    a section that has one; ``None`` is null; ``~key`` removes a key, and the sections that become empty
    by it.

    Args:
        config: the configuration.
        overrides: applied one after the other.

    Raises:
        ConfigError: naming every override that cannot be applied.
    """
    problems = []
    for text in overrides:
        try:
            config = _override(config, text)
        except (ValueError, TypeError, IndexError, yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(f"Override {text}: {_one_line(error)}.")
    if problems:
        raise ConfigError(" ".join(problems))
    return config


def _override(config: DictConfig, text: str) -> DictConfig:
    """Return a configuration with one override, see ``override``."""
    key, equals, value = text.partition("=")
    if key.startswith("~"):
        return _remove(config, key[1:].split("."))
    if not equals or not key:
        raise ConfigError("expected key=value, or ~key to remove a key")
    key = _in_brackets(config, key)
    if _is_component(OmegaConf.select(config, key)):
        key += "._component_"
    text = "null" if value == "None" else value
    return OmegaConf.merge(config, OmegaConf.from_dotlist([f"{key}={text}"]))


def _in_brackets(section: Any, key: str) -> str:
    """Return a key with names of the section that have dots in brackets: ``train.lr[lora.decoder]``."""
    names = (
        [name for name in section if isinstance(name, str)] if isinstance(section, DictConfig) else []
    )
    for name in names:
        if "." in name and f"{key}.".startswith(f"{name}."):
            return f"[{name}]{key.removeprefix(name)}"
    first, dot, rest = key.partition(".")
    if first not in names or not dot:
        return key
    inner = _in_brackets(section.get(first), rest)
    return f"{first}{inner}" if inner.startswith("[") else f"{first}.{inner}"


def _remove(section: DictConfig, path: list[str]) -> DictConfig:
    name, *rest = path
    if not isinstance(section, DictConfig) or name not in section:
        raise ConfigError(f"there is no key {name!r} to remove")
    if rest:
        _remove(section[name], rest)
    if not rest and (name == "_component_" or _is_component(section[name])):
        raise ConfigError("a component cannot be removed")
    if not rest or not section[name]:
        del section[name]
    return section


def _is_component(node: Any) -> bool:
    return isinstance(node, DictConfig) and "_component_" in node


def _first_line(error: OmegaConfBaseException) -> str:
    return str(error.msg or error).splitlines()[0].rstrip(".")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
