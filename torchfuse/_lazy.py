"""Exports of a package that are imported when they are first used.

``import torchfuse`` imports neither torchtune nor transformers, which take seconds. What needs them is
exported through a module-level ``__getattr__`` (PEP 562).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module-level ``__getattr__`` for a package.

    Args:
        package: the package's ``__name__``.
        modules: for each exported name the submodule, relative to the package, that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return get
