"""Let torchtune 0.6.1, its last release, be imported with today's torchao.

torchtune imports one module that torchao has moved and three names that it has removed, so that with
torchao 0.16 or newer ``import torchtune`` fails. ``install`` registers an import hook that adds what is
missing just before the first submodule of torchtune is imported. Names that torchao has are never
replaced, and a process that does not import torchtune is not affected.

The ``tune`` command imports torchtune before anything of torchfuse, and the hook must be registered by
then. torch calls the entry points of the group ``torch.backends`` at the end of ``import torch``, and
torchtune imports torch before its own submodules; so ``install`` is such an entry point. This is why it
is a module of its own, outside the package: every ``import torch`` imports it, and it imports only what
torch has imported already. ``import torchfuse`` calls ``install`` too, for a source tree without entry
points and for ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["install"]

_MOVED = {"torchao.dtypes.nf4tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"}
_REMOVED = {  # torchtune calls them in its quantizers "4w" and "8da4w" only
    "torchao.dtypes": ("TensorCoreTiledLayout",),
    "torchao.quantization": ("int4_weight_only", "int8_dynamic_activation_int4_weight"),
}


class _TorchtuneHook:
    """A finder on ``sys.meta_path`` that finds nothing; it is called before a module is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchtune":
            _hide_messages()
        elif name.startswith("torchtune."):
            _add_missing_names()


_hook = _TorchtuneHook()


def install() -> None:
    """Register the hook, once. Cheap, because every ``import torch`` calls it."""
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)
    if "torchtune" in sys.modules or "torchfuse" in sys.modules:  # they are importing torch
        _hide_messages()


@functools.cache
def _add_missing_names() -> None:
    for name, source in _MOVED.items():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = importlib.import_module(source)
    for module_name, names in _REMOVED.items():
        module = importlib.import_module(module_name)
        for name in names:
            if not hasattr(module, name):
                setattr(module, name, _removed(f"{module_name}.{name}"))


def _removed(name: str) -> Callable[..., NoReturn]:
    def removed(*args: object, **kwargs: object) -> NoReturn:
        import torchao

        raise NotImplementedError(
            f"torchao {torchao.__version__} has no {name}, which torchtune's quantizers '4w' and '8da4w'"
            " call. Use torchfuse.quantize, a configuration of torchao.quantization, or torchao 0.15."
        )

    return removed


def _hide_messages() -> None:
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).addFilter(_is_shown)


def _is_shown(record: logging.LogRecord) -> bool:
    """Hide what importing torchao logs beside a torch for which it was not built.

    torchfuse does not use the C++ kernels that torchao then skips.
    """
    message, args = str(record.msg), record.args or ()
    if record.name == "torchao":
        return not message.startswith("Skipping import of cpp extensions due to incompatible torch")
    of_torchao = any(str(getattr(arg, "__module__", "")).startswith("torchao") for arg in args)
    return not (of_torchao and "is an Enum subclass" in message)
