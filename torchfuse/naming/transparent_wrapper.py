"""A module around another one without a trace in any name.

Hooks on state dicts are not enough: ``named_parameters`` would still contain the name of the wrapper,
and everything that compares the two views (distributed checkpoints, optimizers keyed by name, adapters)
would break. So the wrapper overrides each view that torch has.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming.torch_wrappers import unwrap

__all__ = ["TransparentWrapper"]

# The name under which the wrapped module is registered if it has a member with the usual one.
_FALLBACK_CHILD: Final = "_pretrained"

# Torch's modules that are given the registered children by name, with the wrapped module among them.
_REGISTERED_CHILDREN_FOR: Final = ("torch.distributed.fsdp", "torch.distributed.checkpoint")


def _members(module: nn.Module) -> set[str]:
    """The names directly below a module: its parameters, buffers and children."""
    return {*module._parameters, *module._buffers, *module._modules}


class TransparentWrapper(nn.Module):
    """A module around another one that adds nothing to the names of what it wraps.

    A parameter ``attn.q_proj.weight`` of the wrapped module is ``attn.q_proj.weight`` of the wrapper
    in ``state_dict()`` (in the same order), ``load_state_dict()`` (strict, partial, ``assign=True``;
    in its messages too), ``named_parameters()``, ``named_modules()``, ``get_submodule()``, plain
    attribute access and ``torch.distributed.checkpoint``. The wrapper survives ``pickle`` and
    ``deepcopy``.

    A subclass calls ``wrap`` once, after it has set all of its own attributes.
    """

    _wrapped_child: str

    def wrap(self, module: nn.Module, *, child: str) -> None:
        """Register the module to be wrapped as ``self.<child>``.

        If the module has a member called ``child`` of its own, that name stays the member's and the
        module is registered under a private name.

        Raises:
            ModelError: if a member of the module has a name that the wrapper uses itself.
        """
        members = _members(unwrap(module))
        own = self._modules.keys() | self._parameters.keys() | self._buffers.keys()
        taken = sorted(
            name
            for name in members
            if name in own or name == _FALLBACK_CHILD or name in vars(self) or hasattr(type(self), name)
        )
        if taken:
            raise ModelError(
                f"{type(self).__name__} cannot wrap a {type(module).__name__} and keep its names: "
                f"{', '.join(taken)} would be hidden by the wrapper's own. Rename "
                f"{'it' if len(taken) == 1 else 'them'} in the {type(module).__name__}, or wrap the "
                "module inside it."
            )
        name = _FALLBACK_CHILD if child in members else child
        wrapped_first = {name: module, **self._modules}
        self._modules.clear()
        self._modules.update(wrapped_first)
        self._wrapped_child = name
        self.register_state_dict_post_hook(_remove_child_from_keys)
        self.register_load_state_dict_pre_hook(_add_child_to_keys)
        self.register_load_state_dict_post_hook(_remove_child_from_messages)

    @property
    def wrapped(self) -> nn.Module:
        """The wrapped module."""
        module = self._modules[self._wrapped_child]
        assert module is not None
        return module

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """As ``nn.Module.named_modules``; the wrapped module has the wrapper's own name."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is None:
                continue
            transparent = name == self._wrapped_child
            below = prefix if transparent else f"{prefix}.{name}" if prefix else name
            yield from module.named_modules(memo, below, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As ``nn.Module.named_children``; children of the wrapped module are the wrapper's own."""
        # Torch's policies for activation checkpointing and FSDP replace children by name (setattr), and
        # must find the wrapped module among them. Only the calling module identifies these policies.
        if sys._getframe(1).f_globals.get("__name__", "").startswith(_REGISTERED_CHILDREN_FOR):
            return super().named_children()
        own = {name: module for name, module in super().named_children() if name != self._wrapped_child}
        return itertools.chain(self.wrapped.named_children(), own.items())

    def children(self) -> Iterator[nn.Module]:
        """As ``nn.Module.children``: the registered modules, with the wrapped one among them.

        Torch's recursions (``apply``, ``train``, ``to``, ``fully_shard``) reach every module by these.
        """
        for _, module in super().named_children():
            yield module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules, child = self.__dict__.get("_modules"), self.__dict__.get("_wrapped_child")
            if not modules or child not in modules:  # while __init__ or unpickling still runs
                raise
            return getattr(modules[child], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Assigning a member of the wrapped module replaces it there.
        child = self.__dict__.get("_wrapped_child")
        if child is not None and name not in _members(self):
            wrapped = self.__dict__["_modules"][child]
            if name in _members(unwrap(wrapped)):
                setattr(unwrap(wrapped), name, value)
                return
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        child = self.__dict__.get("_wrapped_child")
        if child is not None and name not in _members(self):
            wrapped = unwrap(self.__dict__["_modules"][child])
            if name in _members(wrapped):
                delattr(wrapped, name)
                return
        super().__delattr__(name)

    def _fqn_modifiers(self) -> dict[str, str]:
        # Read by torch.distributed.checkpoint.state_dict: children that are not part of a name.
        return {self._wrapped_child: self._wrapped_child}


def _remove_child_from_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """After ``state_dict()``: remove the child's name from keys, and keep their order."""
    assert isinstance(module, TransparentWrapper)
    inner = f"{prefix}{module._wrapped_child}."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        state_dict[prefix + key.removeprefix(inner) if key.startswith(inner) else key] = value


def _add_child_to_keys(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before ``load_state_dict()``: add the child's name to keys of the wrapped module."""
    assert isinstance(module, TransparentWrapper)
    own = _members(module) - {module._wrapped_child}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        local = key.removeprefix(prefix)
        if local.split(".", 1)[0] not in own:
            state_dict[f"{prefix}{module._wrapped_child}.{local}"] = state_dict.pop(key)
    # The hook after loading is passed neither of these.
    module.__dict__["_loading"] = (prefix, error_msgs)


def _remove_child_from_messages(module: nn.Module, incompatible_keys: Any) -> None:
    """After ``load_state_dict()``: remove the child's name from missing and other reported keys."""
    assert isinstance(module, TransparentWrapper)
    prefix, error_msgs = module.__dict__.pop("_loading")
    inner = f"{prefix}{module._wrapped_child}."
    for names in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
        names[:] = [prefix + n.removeprefix(inner) if n.startswith(inner) else n for n in names]
    pattern = re.compile(rf"(?<![\w.]){re.escape(inner)}")
    error_msgs[:] = [pattern.sub(lambda _: prefix, message) for message in error_msgs]
