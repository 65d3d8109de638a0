"""The public surface, name by name with signatures, is the one in ``public_surface.txt``.

A change of it must be deliberate: ``python tests/test_public_surface.py`` rewrites the file, and the diff is
reviewed with the change.
"""

import enum
import importlib
import importlib.util
import inspect
import re
import types
import typing
from pathlib import Path

FILE = Path(__file__).with_suffix("").with_name("public_surface.txt")
REFERENCE = Path(__file__).parents[1] / "docs" / "reference.py"


def reference():
    """The module that makes the reference of the site."""
    spec = importlib.util.spec_from_file_location("reference", REFERENCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def public_modules():
    return reference().PUBLIC_MODULES


def signature(function):
    try:
        text = str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are strings in most files


def members(cls, public):
    """The public methods and properties of a class, without those of a public base."""
    inherited = {name for base in cls.__mro__[1:] if base in public for name in dir(base)}
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] == "torchfuse":
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    for name in sorted(found.keys() - (inherited - vars(cls).keys())):
        value = found[name]
        if isinstance(value, property):
            yield f"{name}: property"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{name}{signature(value.__func__)}: {type(value).__name__}"
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"


def describe(path, value, public):
    if isinstance(value, type) and issubclass(value, BaseException):
        return [f"class {path}({value.__bases__[0].__name__})"]
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return [f"enum {path}: {', '.join(value.__members__)}"]
    if isinstance(value, type):
        bases = [public[base] for base in value.__mro__[1:] if base in public]
        of = f" of {bases[0]}" if bases else ""
        return [
            f"class {path}{signature(value)}{of}",
            *(f"    {line}" for line in members(value, public)),
        ]
    if typing.get_origin(value) is not None or isinstance(value, types.UnionType):
        return [f"type {path} = {value}"]
    if callable(value):
        return [f"def {path}{signature(value)}"]
    return [f"{path}: {type(value).__name__}"]


def surface():
    root, *packages = public_modules()
    exported = [
        (f"{module}.{name}", getattr(importlib.import_module(module), name))
        for module in (*packages, root)
        for name in sorted(importlib.import_module(module).__all__)
    ]
    public = {}
    for path, value in exported:
        if isinstance(value, type):
            public.setdefault(value, path)
    lines, first = [], {}
    for path, value in exported:
        same = first.setdefault(id(value), path)
        lines += [f"{path} = {same}"] if same != path else describe(path, value, public)
    return "\n".join(lines) + "\n"


def test_the_surface_is_the_one_that_is_written_down():
    assert surface() == FILE.read_text(encoding="utf-8"), (
        f"run python {Path(__file__).name} and review the diff"
    )


def test_every_public_name_has_a_docstring():
    for module in public_modules():
        imported = importlib.import_module(module)
        for name in imported.__all__:
            value = getattr(imported, name)
            if inspect.isfunction(value) or isinstance(value, type):
                assert value.__doc__, f"{module}.{name}"


def test_public_modules_import_from_their_own_names():
    for module in public_modules():
        imported = importlib.import_module(module)
        assert len(set(imported.__all__)) == len(imported.__all__), module


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
