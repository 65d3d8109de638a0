"""Makes the reference: a page for the names of ``torchfuse``, and one for every module below it.

A module is public if it has ``__all__`` with something in it; its page shows exactly those names.
"""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = Path(__file__).parent.parent / "torchfuse"
# The order of the layers, from what is called first to what lies deepest.
GROUPS = {
    "Models": "models",
    "Modules": "modules",
    "Encoders": "encoders",
    "Checkpoints": "checkpoint",
    "Parameters": "params",
    "Generation": "generation",
    "Data": "data",
    "Running": "",
}


def public_names(path: Path) -> list[str]:
    """What a module's ``__all__`` lists."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def pages() -> dict[str, dict[str, str]]:
    """For each group the modules in it, and for each module the source of its page."""
    root = f"# torchfuse\n\n::: torchfuse\n{_options(public_names(PACKAGE / '__init__.py'))}"
    found = {"": {"torchfuse": root}}
    for title, folder in GROUPS.items():
        found[title] = {}
        for path in sorted((PACKAGE / folder).glob("*.py")):
            names = public_names(path)
            if path.name != "__init__.py" and names:
                module = ".".join(["torchfuse", *([folder] if folder else []), path.stem])
                found[title][module] = f"# {module}\n\n::: {module}\n{_options(names)}"
    return found


def _options(names: list[str]) -> str:
    options = {"show_root_heading": "false", "show_root_toc_entry": "false", "heading_level": "2"}
    lines = [f"        {name}: {value}" for name, value in options.items()]
    return "\n".join(["    options:", *lines, f"        members: [{', '.join(names)}]", ""])


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages behind what ``mkdocs.yml`` lists."""
    nav: list[object] = []
    for title, modules in pages().items():
        listed = [{module: f"reference/{module}.md"} for module in modules]
        nav += [{title: listed}] if title else listed
    config.nav = [*config.nav, {"Reference": nav}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site's files."""
    for modules in pages().values():
        for module, source in modules.items():
            files.append(File.generated(config, f"reference/{module}.md", content=source))
    return files
