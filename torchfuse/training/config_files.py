"""Configurations that come with torchfuse, found by name: ``llava/stage1``."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path
from typing import Final

from torchfuse.errors import ConfigError

__all__ = ["config_names", "copy_config", "find_config", "summary_of"]

_RECIPES: Final = "torchfuse.recipes"  # the folder ``configs`` is beside the recipes
_SUFFIXES: Final = (".yaml", ".yml")


def config_names() -> list[str]:
    """Return the names of the installed configurations, in alphabetical order."""
    folder = _folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the file of a configuration.

    Args:
        name: a path, or the name of an installed configuration. What exists, or ends in ``.yaml`` or
            ``.yml``, is a path.

    Raises:
        ConfigError: for a name that no installed configuration has.

    Examples:
        >>> find_config("digits/mot").name, str(find_config("runs/mine.yaml"))
        ('mot.yaml', 'runs/mine.yaml')
    """
    path = Path(name)
    if path.suffix in _SUFFIXES or path.exists():
        return path
    if str(name) not in (names := config_names()):
        raise ConfigError(
            f"{name} is neither a file nor the name of an installed configuration; there are "
            f"{', '.join(names)}."
        )
    return _folder() / f"{name}.yaml"


def copy_config(name: str, destination: str | Path) -> Path:
    """Copy an installed configuration, to be changed.

    Args:
        name: its name.
        destination: the file to write, or an existing folder, in which it keeps the last part of its
            name. Folders above it are made.

    Returns:
        The file that was written.

    Raises:
        ConfigError: for an unknown name, a file that exists, or one that cannot be written.
    """
    source, target = find_config(name), Path(destination)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target} exists; remove it, or name another file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror or error}).") from error
    return target


def summary_of(name: str) -> str:
    """Return the first sentence of an installed configuration's header."""
    text = find_config(name).read_text(encoding="utf-8")
    header = " ".join(line.removeprefix("#").strip() for line in text.partition("\n#\n")[0].splitlines())
    return header.partition(". ")[0].rstrip(".") + "."


def _folder() -> Path:
    return Path(str(resources.files(_RECIPES))) / "configs"
