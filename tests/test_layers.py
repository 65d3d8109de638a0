"""The structure of the package: imports go down, in no circle; importing it is cheap."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import torchfuse
from torchfuse import recipes
from torchfuse.models import ModalityStrategy, strategy

PACKAGE = Path(torchfuse.__file__).parent
# From the ground up: a module imports from its own layer and from those before it.
LAYERS = [
    "errors",
    "_lazy",
    "naming",
    "options",
    "components",
    "io",
    "params",
    "modules",
    "encoders",
    "models",
    "quantization",
    "lora",
    "checkpoint",
    "data",
    "generation",
    "training",
    "tasks",
    "cli",
    "__main__",
    "recipes",
]
# What takes seconds to import, and is imported where it is used.
HEAVY = ("torchtune", "transformers", "torchao", "torchvision", "sympy", "torch.distributed.tensor")


@functools.cache
def modules():
    """The syntax trees of all modules, by dotted name; a package is its ``__init__``."""
    found = {}
    for root, name in ((PACKAGE, "torchfuse"), (Path(recipes.__file__).parent, "torchfuse.recipes")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            dotted = ".".join([name, *(part for part in parts if part != "__init__")])
            found[dotted] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@functools.cache
def imports(module):
    """The modules of torchfuse that a module imports, at its top and in its functions."""
    found = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchfuse":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules().keys() or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torchfuse"}
    return found - {module}


def layer(module):
    return module.split(".")[1] if "." in module else "torchfuse"


def test_every_module_has_a_layer():
    assert {layer(module) for module in modules()} - {"torchfuse"} == set(LAYERS)


def test_imports_go_down():
    rank = {name: place for place, name in enumerate(LAYERS)} | {"torchfuse": LAYERS.index("tasks")}
    upwards = [
        f"{module} imports {imported}"
        for module in modules()
        for imported in imports(module)
        if layer(module) != layer(imported) and rank[layer(imported)] >= rank[layer(module)]
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    order = graphlib.TopologicalSorter({module: imports(module) for module in modules()})
    order.prepare()  # raises a CycleError that names the circle


def test_at_most_ten_floors():
    below = {name: set() for name in {layer(module) for module in modules()}}
    for module in modules():
        below[layer(module)] |= {layer(imported) for imported in imports(module)} - {layer(module)}
    floors = {}
    for name in graphlib.TopologicalSorter(below).static_order():
        floors[name] = 1 + max((floors[other] for other in below[name]), default=0)
    assert max(floors.values()) <= 10, floors


def test_a_folder_holds_at_most_fifteen_modules():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 15, folder


def test_an_architecture_has_a_module_of_its_name():
    for name, cls in strategy._REGISTRY.items():
        if cls.__module__.startswith("torchfuse."):
            assert cls.__module__ == f"torchfuse.models.strategies.{name}"
    assert issubclass(strategy._REGISTRY["cross_attention"], ModalityStrategy)


def test_parts_need_torch_alone():
    for module, tree in modules().items():
        if layer(module) == "modules":
            roots = {
                (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names
            }
            foreign = {root.split(".")[0] for root in roots} - set(sys.stdlib_module_names)
            assert foreign <= {"torch", "torchfuse"}, module


def test_importing_the_package_brings_nothing_that_takes_seconds():
    # torch itself brings what it needs; only what comes on top of it counts.
    code = (
        "import sys, torch; before = {*sys.modules}; import torchfuse; "
        f"print([name for name in {HEAVY} if name in sys.modules and name not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_exist():
    assert all(hasattr(torchfuse, name) for name in torchfuse.__all__)
