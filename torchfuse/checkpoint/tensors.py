"""Tensors of a module: listed, gathered from a sharded model, prepared for a file, overwritten."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchfuse.params import is_sharded

__all__ = ["copy_into", "gather_full", "module_tensors", "to_safetensors"]


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers themselves, under the names of the state dict."""
    return dict(module.state_dict(keep_vars=True))


def gather_full(tensor: Tensor) -> Tensor:
    """Return the full values of a tensor; every rank calls this if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_safetensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors as safetensors takes them: on the CPU, contiguous, without shared memory."""
    seen: set[int] = set()
    prepared = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        prepared[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return prepared


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Overwrite a tensor.

    Args:
        target: the tensor; a sharded one takes its own shard of the values.
        values: the full values, of the same shape or with the first axis unflattened.
    """
    if is_sharded(target) and not is_sharded(values):
        # Every rank has read the values, so nothing need be sent.
        from torch.distributed.tensor import distribute_tensor  # already imported: target is a DTensor

        values = distribute_tensor(
            values.reshape(target.shape).to(target.device, target.dtype),
            target.device_mesh,
            target.placements,
            src_data_rank=None,
        )
    plain = target.detach()
    (plain if plain.shape == values.shape else plain.view(values.shape)).copy_(values)
