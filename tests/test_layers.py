"""Arrows in the package go down only, and importing it stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchfuse

PACKAGE = Path(torchfuse.__file__).parent
# From the ground up: a module imports from its own layer and from those before it.
LAYERS = [
    "errors",
    "_lazy",
    "naming",
    "options",
    "io",
    "params",
    "modules",
    "encoders",
    "models",
    "checkpoint",
    "quantization",
    "data",
    "generation",
    "training",
    "tasks",
    "cli",
    "__main__",
    "recipes",
]
FILES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def layer_of(dotted: str) -> str:
    return dotted.split(".")[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchfuse."):
            found.add(layer_of(node.module))
        elif isinstance(node, ast.ImportFrom) and node.module == "torchfuse":
            found.add("__init__")
        elif isinstance(node, ast.Import):
            found |= {layer_of(a.name) for a in node.names if a.name.startswith("torchfuse.")}
    return found


def test_every_file_has_a_layer():
    assert {p.parts[0].removesuffix(".py") for p in FILES} == set(LAYERS) - {"recipes"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_arrow_up(path):
    own = path.parts[0].removesuffix(".py")
    allowed = set(LAYERS[: LAYERS.index(own) + 1])
    assert imports(PACKAGE / path) <= allowed


def test_parts_need_torch_alone():
    for path in (PACKAGE / "modules").rglob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        foreign = {root.split(".")[0] for root in roots} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "torchfuse"}, path


def test_import_brings_neither_torchtune_nor_transformers():
    code = (
        "import sys, torchfuse; "
        "print([m for m in ('torchtune', 'transformers', 'torchao', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist():
    assert all(hasattr(torchfuse, name) for name in torchfuse.__all__)
    assert len(set(torchfuse.__all__)) == len(torchfuse.__all__)
