"""The memory and the operations of a computation on fake tensors, as they would be with real ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["MemoryTracker"]

_ATEN: Final = torch.ops.aten


class MemoryTracker(TorchDispatchMode):
    """Sum up the bytes of all tensors that exist, at every moment of a computation.

    Inside of a ``FakeTensorMode`` nothing is computed or allocated, but tensors are created and freed as
    in a real computation, those that autograd saves for the backward pass too. Tensors that share memory
    count once.

    Args:
        supervised: how many positions are supervised. Fake labels have no values, so that the number of
            rows that a mask selects must be given.

    Attributes:
        live: bytes of the tensors that exist, by kind.
        peak: ``live`` at the moment when it was largest since the last call of ``begin``.
        flops: floating-point operations since then.
    """

    def __init__(self, supervised: int = 0) -> None:
        super().__init__()
        self.supervised = supervised
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self._kind = "other"
        # The storages that exist: kind and size by address.
        self._storages: dict[int, tuple[str, int]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def begin(self) -> None:
        """Begin a phase: forget peak and operations."""
        self.peak, self.flops = Counter(self.live), 0

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Count tensors that are created in the context as of a kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def add(self, tensor: Tensor, kind: str | None = None, *, nbytes: int | None = None) -> None:
        """Count a tensor that exists, or count it as of another kind than before.

        Args:
            tensor: the tensor; only its storage matters.
            kind: None: the one of the context, if it does not count yet.
            nbytes: its size, where that is another than the storage's.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            if kind is None:
                return
            before, size = self._storages[key]
            self.live[before] -= size
        else:
            size = storage.nbytes() if nbytes is None else nbytes
            self._references[key] = weakref.ref(storage, lambda _: self._remove(key))
        self._storages[key] = kind or self._kind, size
        self.live[kind or self._kind] += size
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _remove(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        del self._references[key]
        self.live[kind] -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.index.Tensor:
            args = (args[0], self._with_integers(args[1]))
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def _with_integers(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Return indices without masks: which rows these select depends on values."""
        result: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                result.append(index)
            else:
                rows = torch.empty(self.supervised, dtype=torch.long, device=index.device)
                result += [rows] * index.dim()
        return result


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, _repeated(k, q), _repeated(v, q)))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, _repeated(k, q), _repeated(v, q)))


def _repeated(keys: Any, queries: Any) -> tuple[int, ...]:
    """The shape of keys or values, repeated for the heads of queries, as torch 2.9 counts them."""
    return (*queries.shape[:2], *keys.shape[2:])


# Operations of each kernel; torch has no entry for attention on a CPU.
_COUNTS: Final[dict[Any, Callable[..., int]]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
