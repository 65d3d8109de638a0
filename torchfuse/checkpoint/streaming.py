"""Values of checkpoints streamed into modules.

A few tensors at a time are read from the file's pages, converted and copied, so that memory holds little
more than the model. Tensors on the meta device get their memory just before; sharded tensors take their
own shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchfuse.checkpoint.matching import Source
from torchfuse.checkpoint.tensors import copy_into
from torchfuse.params import is_sharded

__all__ = ["compute_buffers", "fill"]

_MAX_THREADS: Final = 4


@torch.no_grad()
def fill(sources: Sequence[Source], modules: Iterable[nn.Module], device: torch.device) -> None:
    """Copy every source into its tensor, with a progress bar by bytes on a terminal.

    Args:
        sources: sources without problems.
        modules: the modules that the tensors belong to.
        device: where tensors on the meta device get their memory.
    """
    for source in sources:
        if source.target.is_meta:
            _allocate(source.target, device)
    # A tensor with two names is written once, so that no two threads write to it. The largest come
    # first, so that no thread ends up alone with one.
    each = list({id(source.target): source for source in sources}.values())
    each.sort(key=lambda source: source.target.nbytes, reverse=True)
    total = sum(source.target.nbytes for source in each)
    sharded = any(is_sharded(source.target) for source in each)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=None) as bar,
        ThreadPoolExecutor(min(_MAX_THREADS, torch.get_num_threads())) as pool,
    ):
        # Half of the time goes into page faults, which threads handle in parallel. Sharded tensors may
        # communicate with other ranks, so they are copied in order, in the caller's thread.
        for nbytes in (map if sharded else pool.map)(_copy, each):
            bar.update(nbytes)
    for module in modules:
        compute_buffers(module, device)


def _copy(source: Source) -> int:
    copy_into(source.target, source.read())
    return source.target.nbytes


def _allocate(target: Tensor, device: torch.device) -> None:
    """Give a tensor on the meta device memory; it stays the same object."""
    allocated: Any = torch.empty_like(target, device=device, requires_grad=target.requires_grad)
    if isinstance(target, nn.Parameter):
        allocated = nn.Parameter(allocated, requires_grad=target.requires_grad)
    torch.utils.swap_tensors(target, allocated)


def compute_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute rotary tables, which no checkpoint holds and which the meta device could not."""
    for part in module.modules():
        lacking = any(b.is_meta for b in part._buffers.values() if b is not None)
        initialize = getattr(part, "rope_init", None)
        if callable(initialize) and (lacking or getattr(part, "is_cache_built", True) is False):
            with device:
                initialize()
