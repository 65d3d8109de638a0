"""The chat template in a tokenizer's directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.io.strict_json import read_json

__all__ = ["FoundTemplate", "find_template", "read_template"]


class FoundTemplate(NamedTuple):
    """The source of a template, its name in messages, and whether BOS is added in front of its text."""

    source: str
    name: str
    adds_bos: bool


def find_template(folder: Path) -> FoundTemplate | None:
    """Return the template that ``apply_chat_template`` of transformers uses; None if there is none.

    A processor's template comes before the tokenizer's. A processor, unlike a tokenizer, adds BOS where
    its template does not.

    Raises:
        ConfigError: if there are several templates and none is the default, or a file cannot be read.
        CheckpointError: if a file is damaged.
    """
    of_processor = (folder / "processor_config.json").is_file()
    file = folder / "chat_template.jinja"
    if file.is_file():
        return FoundTemplate(read_template(file), str(file), of_processor)
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        found = read_json(file).get("chat_template") if file.is_file() else None
        if found is not None:
            name = f"{file}, chat_template"
            adds_bos = of_processor or file.name == "chat_template.json"
            return FoundTemplate(_default(found, name), name, adds_bos)
    others = folder / "additional_chat_templates"
    if others.is_dir():
        _default({file.stem: "" for file in sorted(others.glob("*.jinja"))}, str(others))
    return None


def _default(found: Any, name: str) -> str:
    """Return the one template, or the default of several."""
    if isinstance(found, list):
        entries = [entry if isinstance(entry, dict) else {} for entry in found]
        found = {entry.get("name"): entry.get("template") for entry in entries}
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(
                f"{name} has templates of the names {', '.join(map(str, found))}, and none is the "
                "default: write the one to use into a .jinja file, and give that as the template."
            )
        found = found["default"]
    if not isinstance(found, str):
        raise CheckpointError(f"{name} must be a template, or a list of named ones, got {found!r:.80}.")
    return found


def read_template(file: Path) -> str:
    """Return the source of a template.

    Raises:
        ConfigError: if the file cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The template {file} cannot be read: {error}.") from error
