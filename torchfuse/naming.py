"""Names of parameters, the same in every view.

Two things live here and nowhere else: the code that renames the keys of our own wrappers, and the
helpers that undo what other wrappers (activation checkpointing, ``torch.compile``, DDP) add to a
name.

``TransparentWrapper`` puts a module around another one without leaving a trace in any name.
Hooks on the state dict alone are not enough for that: ``named_parameters`` would still show the
wrapper, and everything that compares the two views (distributed checkpoints, optimizers keyed by
name, adapters) would break. So the wrapper speaks for itself in each view that PyTorch has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar, Final

from torch import nn

from torchfuse.errors import ModelError

__all__ = ["TransparentWrapper", "canonical_name", "model_behind", "named_parameters", "unwrap"]

# What PyTorch's own wrappers add to a name, one path component each.
_FOREIGN_COMPONENTS: Final = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
)
_PARALLEL_WRAPPERS: Final = (nn.parallel.DistributedDataParallel, nn.DataParallel)

# Where the wrapped module is registered if it has a member with the usual name of its own.
_FALLBACK_CHILD: Final = "_pretrained"


def canonical_name(name: str) -> str:
    """The name that a parameter or module has without any wrapper around it.

    Examples:
        >>> canonical_name("decoder.layers.0._checkpoint_wrapped_module.attn.q_proj.weight")
        'decoder.layers.0.attn.q_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _FOREIGN_COMPONENTS)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, activation-checkpoint and data-parallel wrappers.

    Examples:
        >>> import torch
        >>> linear = nn.Linear(3, 5)
        >>> unwrap(torch.compile(linear)) is linear
        True
    """
    while True:
        if isinstance(module, _PARALLEL_WRAPPERS):
            module = module.module
            continue
        inner = next((module._modules[c] for c in _FOREIGN_COMPONENTS if c in module._modules), None)
        if inner is None:
            return module
        module = inner


def model_behind(module: nn.Module) -> nn.Module:
    """The module inside all wrappers and faces: what somebody who hands it over speaks of.

    It is for questions about a model, what it is and what it holds. Whatever acts on the module that
    is called, such as sharding, wants ``unwrap``.
    """
    while True:
        module = unwrap(module)
        if not (isinstance(module, TransparentWrapper) and module.is_face):
            return module
        module = module.wrapped


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model under their canonical names, in ``named_parameters`` order.

    Examples:
        >>> import torch
        >>> [name for name, _ in named_parameters(torch.compile(nn.Linear(3, 5)))]
        ['weight', 'bias']
    """
    for name, parameter in unwrap(model).named_parameters():
        yield canonical_name(name), parameter


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

    is_face: ClassVar[bool] = False
    """Whether this is only another way to call the wrapped module, and holds nothing else."""

    _wrapped_child: str

    def wrap(self, module: nn.Module, *, child: str) -> None:
        """Register the module to be wrapped as ``self.<child>``.

        If the module has a member called ``child`` of its own, that name stays the member's and the
        module is registered under a private name.

        Raises:
            ModelError: if a member of the module has a name that the wrapper uses itself, so that
                the name could not be kept.
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

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules, child = self.__dict__.get("_modules"), self.__dict__.get("_wrapped_child")
            if not modules or child not in modules:  # while __init__ or unpickling still runs
                raise
            return getattr(modules[child], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Replacing a part of the wrapped module by its name must replace it there, not beside it.
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
    """After ``state_dict()``: rename our keys, and put all of them back in their order."""
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
    """Before ``load_state_dict()``: whatever is not a child of the wrapper is the wrapped module's."""
    assert isinstance(module, TransparentWrapper)
    beside = _members(module) - {module._wrapped_child}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        local = key.removeprefix(prefix)
        if local.split(".", 1)[0] not in beside:
            state_dict[f"{prefix}{module._wrapped_child}.{local}"] = state_dict.pop(key)
    # The hook after loading is told neither of these.
    module.__dict__["_loading"] = (prefix, error_msgs)


def _remove_child_from_messages(module: nn.Module, incompatible_keys: Any) -> None:
    """After ``load_state_dict()``: missing, unexpected and mismatched keys by the names users know."""
    assert isinstance(module, TransparentWrapper)
    prefix, error_msgs = module.__dict__.pop("_loading")
    inner = f"{prefix}{module._wrapped_child}."
    for names in (incompatible_keys.missing_keys, incompatible_keys.unexpected_keys):
        names[:] = [prefix + n.removeprefix(inner) if n.startswith(inner) else n for n in names]
    whole = re.compile(rf"(?<![\w.]){re.escape(inner)}")
    error_msgs[:] = [whole.sub(lambda _: prefix, message) for message in error_msgs]
