"""The reference of the site: a page for every public module, with the names in its ``__all__`` alone."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
# Everything else in the package is private.
PUBLIC_MODULES = (
    "torchfuse",
    "torchfuse.models",
    "torchfuse.models.builders",
    "torchfuse.modules",
    "torchfuse.encoders",
    "torchfuse.checkpoint",
    "torchfuse.params",
    "torchfuse.quantization",
    "torchfuse.lora",
    "torchfuse.generation",
    "torchfuse.data",
    "torchfuse.training",
    "torchfuse.tasks",
    "torchfuse.errors",
)


def public_names(module: str) -> list[str]:
    """Return the ``__all__`` of a module, read from its source."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{file} has no __all__.")


def documented_names(module: str) -> list[str]:
    """Return the public names that a module's page shows.

    A function named as the submodule that defines it (``torchfuse.models.fuse``) has no address for
    tools that read the source: it is shown on the page of ``torchfuse``.
    """
    path = ROOT.joinpath(*module.split("."))
    return [name for name in public_names(module) if not (path / f"{name}.py").exists()]


def page(module: str) -> str:
    """Return the source of a module's page."""
    options = {
        "show_root_heading": "false",
        "show_root_toc_entry": "false",
        "heading_level": "2",
        "members": f"[{', '.join(documented_names(module))}]",
    }
    lines = [f"        {name}: {value}" for name, value in options.items()]
    return "\n".join([f"# {module}", "", f"::: {module}", "    options:", *lines, ""])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the pages to the navigation of ``mkdocs.yml``."""
    pages = [{module: f"reference/{module}.md"} for module in PUBLIC_MODULES]
    config.nav = [*config.nav, {"Reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the files of the site."""
    from mkdocs.structure.files import File

    for module in PUBLIC_MODULES:
        files.append(File.generated(config, f"reference/{module}.md", content=page(module)))
    return files
