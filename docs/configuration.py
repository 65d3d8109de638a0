"""The page of all configurations: every key of every recipe, from the dataclasses of the recipes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torchfuse.training.config_keys import ConfigKey, config_keys

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

RECIPES = ("finetune", "evaluate", "generate", "compare")
INTRODUCTION = """
A recipe takes a YAML file or the name of an [installed one](configs.md), `--config NAME_OR_FILE`,
and keys that replace those of the file: `train.lr=1e-3` sets a key, `~train.max_steps` removes one. An
unknown key, a missing one and a value of the wrong type are errors that name the key.
`python -m torchfuse.recipes.finetune --help` prints the same list. A *component* is a section with
`_component_`, the dotted path of a function or class, and its keywords.
"""


def page() -> str:
    """Return the source of the page."""
    lines = ["# Configuration", INTRODUCTION.strip()]
    for name in RECIPES:
        recipe: Any = importlib.import_module(f"torchfuse.recipes.{name}")
        summary = (recipe.__doc__ or "").partition("\n\n")[0]
        table = "\n".join(_table(config_keys(recipe.Config)))
        lines += [f"## {name}", summary, table]
    return "\n\n".join(lines) + "\n"


def _table(keys: Iterator[ConfigKey]) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys:
        default = "required" if key.default is None else f"`{key.default}`" if key.default else ""
        yield f"| `{key.name}` | {key.type} | {default} | {key.meaning} |"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to the files of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "configuration.md", content=page()))
    return files
