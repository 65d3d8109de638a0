"""Tensors of a checkpoint into those of a module: compared first, all of them, then streamed.

Nothing is written before everything fits. Then tensors, a few at a time, are read from the file's pages,
converted and put in place, so that memory holds the model and little else; a module on the meta device
gets its memory just before. A sharded module keeps of each tensor the part that is its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchfuse.checkpoint.formats.key_table import KeyTable, Layout
from torchfuse.io.directory import Checkpoint
from torchfuse.params import is_sharded, quantized_dtype

__all__ = ["Source", "copy_into", "fill", "find_sources", "tensors_of"]

_MAX_THREADS: Final = 4


@dataclass(frozen=True)
class Source:
    """Where one tensor of a module comes from.

    Attributes:
        name: the tensor's, in the module.
        target: the tensor.
        file: what it is read from.
        key: its name there.
        layout: how values are laid out there.
        rows: which rows of theirs it is; None: all.
    """

    name: str
    target: Tensor
    file: Checkpoint
    key: str
    layout: Layout | None
    rows: slice | None

    def read(self) -> Tensor:
        """The values, laid out as ours are, with first axes that ``copy_into`` flattens into one."""
        tensor = self.file.read(self.key)
        if self.rows is not None:
            tensor = tensor[self.rows]
        return tensor if self.layout is None else self.layout.read(tensor)


def find_sources(
    targets: Mapping[str, Tensor],
    file: Checkpoint,
    table: KeyTable,
    *,
    tied: bool,
    prefix: str = "",
) -> tuple[list[Source], list[str]]:
    """Find where each tensor comes from, and all that does not fit.

    Args:
        targets: the tensors to fill, by our names.
        file: the checkpoint.
        table: its names and ours.
        tied: whether the checkpoint says that its head is its embedding.
        prefix: keys that do not begin with this belong to another part; without it they are unexpected.
    """
    keys = [key for key in file if key.startswith(prefix)]
    found, unknown = (table.under(prefix, "") if prefix else table).read(keys)
    problems = [f"unexpected: {key}" for key in unknown]
    for name, origin in table.tied.items():
        if origin not in found:
            continue
        if name in targets and name not in found and tied:
            found[name] = found[origin]  # one tensor there, two here
        elif name not in targets and name in found:
            key, (other, _) = found.pop(name)[0], found[origin]  # two tensors there, one here
            if file[key] != file[other] or not torch.equal(file.read(key), file.read(other)):
                problems.append(f"unexpected: {key}")
    sources = [
        Source(name, target, file, *found[name], None)
        for name, target in targets.items()
        if name in found
    ]
    sources = _split_rows(sources, targets, table)
    filled = {source.name for source in sources}
    problems += [f"unexpected: {key}" for name, (key, _) in found.items() if name not in targets]
    problems += [f"missing: {name}" for name in targets if name not in filled]
    problems += [
        f"quantized: {n}; load before quantize" for n, t in targets.items() if quantized_dtype(t)
    ]
    return sources, problems + [problem for source in sources for problem in _misfit(source)]


def _split_rows(sources: list[Source], targets: Mapping[str, Tensor], table: KeyTable) -> list[Source]:
    """Give rows that stand behind others in one tensor of theirs to the tensor that they are here."""
    by_name = {source.name: source for source in sources}
    for name, origin in table.appended.items():
        if name not in targets or name in by_name or origin not in by_name:
            continue
        base, new, rest = by_name[origin], targets[name].shape[0], targets[name].shape[1:]
        old = targets[origin].shape[0]
        if base.file[base.key] == (old + new, *rest):
            by_name[origin] = Source(origin, base.target, base.file, base.key, None, slice(0, old))
            by_name[name] = Source(name, targets[name], base.file, base.key, None, slice(old, old + new))
    return list(by_name.values())


def _misfit(source: Source) -> list[str]:
    theirs, dtype = source.file[source.key], source.file.dtype(source.key)
    meta = torch.empty(theirs, dtype=dtype, device="meta")
    try:
        read = meta if source.rows is None else meta[source.rows]
        if source.layout is not None:
            read = source.layout.read(read)
            read = read.flatten(0, max(0, read.dim() - source.target.dim()))
    except (RuntimeError, IndexError, ValueError):
        read = meta
        shape = None
    else:
        shape = read.shape
    problems = []
    if shape != source.target.shape:
        problems.append(
            f"shape: {source.key} is {list(theirs)}, {source.name} is {list(source.target.shape)}"
        )
    if dtype.is_floating_point != source.target.dtype.is_floating_point:
        problems.append(f"dtype: {source.key} is {dtype}, {source.name} is {source.target.dtype}")
    return problems


@torch.no_grad()
def fill(sources: list[Source], modules: list[nn.Module], device: torch.device) -> None:
    """Stream every tensor into place.

    Args:
        sources: what ``find_sources`` found, without problems.
        modules: what the tensors belong to; those on the meta device get memory.
        device: where that memory is.
    """
    for source in sources:
        if source.target.is_meta:
            _give_memory(source.target, device)
    # What stands under two names is written once, so that no two threads write to it; the largest come
    # first, so that no thread is left alone with one at the end.
    each = list({id(source.target): source for source in sources}.values())
    each.sort(key=lambda source: source.target.nbytes, reverse=True)
    total = sum(source.target.nbytes for source in each)
    sharded = any(is_sharded(source.target) for source in each)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=None) as bar,
        ThreadPoolExecutor(min(_MAX_THREADS, torch.get_num_threads())) as pool,
    ):
        # Several at once: half of the time goes into fetching pages, one by one and for one thread. What
        # is sharded may talk to other ranks, so it keeps to the order and to the thread of the caller.
        for nbytes in (map if sharded else pool.map)(_read_into_target, each):
            bar.update(nbytes)
    for module in modules:
        _compute_buffers(module, device)


def _read_into_target(source: Source) -> int:
    copy_into(source.target, source.read())
    return source.target.nbytes


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Copy whole values into a tensor, of which a sharded one keeps its own part."""
    if is_sharded(target) and not is_sharded(values):
        # Every rank has read them, so nothing need be sent.
        from torch.distributed.tensor import distribute_tensor  # imported already: the target is one

        values = distribute_tensor(
            values.reshape(target.shape).to(target.device, target.dtype),
            target.device_mesh,
            target.placements,
            src_data_rank=None,
        )
    held = target.detach()
    (held if held.shape == values.shape else held.view(values.shape)).copy_(values)


def _give_memory(target: Tensor, device: torch.device) -> None:
    """Exchange a tensor on the meta device for one with memory; whoever holds it holds that now."""
    held: Any = torch.empty_like(target, device=device, requires_grad=target.requires_grad)
    if isinstance(target, nn.Parameter):
        held = nn.Parameter(held, requires_grad=target.requires_grad)
    torch.utils.swap_tensors(target, held)


def _compute_buffers(module: nn.Module, device: torch.device) -> None:
    """Have modules compute what no checkpoint holds and the meta device could not."""
    for part in module.modules():
        lacking = any(b.is_meta for b in part._buffers.values() if b is not None)
        initialize = getattr(part, "rope_init", None)
        if callable(initialize) and (lacking or getattr(part, "is_cache_built", True) is False):
            with device:
                initialize()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names of the state dict, the same objects."""
    return dict(module.state_dict(keep_vars=True))
