"""Sharding of a fused model for FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from torchfuse.errors import ModelError
from torchfuse.naming import find_model, unwrap
from torchfuse.params import fusion_buffers, get_fusion_params, parts_of

__all__ = ["shard"]


def shard(model: nn.Module, **options: Any) -> None:
    """Shard a fused model by FSDP2: each transformer layer of decoder and encoders, then the rest.

    Under FSDP2 every rank must run the same modules in every step, so fuse with
    ``on_missing="participate"``. What fusion added starts with rank zero's values on every rank,
    however each was seeded. An encoder of another dtype than the decoder's is sharded as a unit of its
    own. Trainable and frozen parameters are sharded alike, so which of them train may change later
    (see ``torchfuse.params.FreezeSchedule``).

    Args:
        model: a fused model, before its optimizer is built.
        **options: for ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.

    Raises:
        ModelError: if there is no layer to shard, or a batch without images would block the other ranks.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes over a second

    model = find_model(model)
    layers = [layer for part in parts_of(model).values() for layer in _layers(part)]
    if not layers:
        raise ModelError("There is no layer to shard: no part of the model has an nn.ModuleList.")
    if getattr(unwrap(model), "on_missing", "participate") != "participate":
        raise ModelError(
            'A sharded model needs on_missing="participate": without it a rank whose batch has no image '
            "runs fewer modules than the others, and they hang."
        )
    for tensor in [*get_fusion_params(model).values(), *fusion_buffers(model).values()]:
        if not tensor.is_meta:
            distributed.broadcast(tensor.detach(), src=0)
    parts = parts_of(model)
    # A unit reduces all of its gradients in one dtype.
    apart = [part for part in parts.values() if _dtypes(part) != _dtypes(parts["decoder"])]
    for module in [*layers, *apart]:
        fully_shard(module, **options)
    fully_shard(model, **options)
    if hasattr(unwrap(model), "encode"):
        register_fsdp_forward_method(unwrap(model), "encode")  # called beside forward


def _layers(part: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the members of the outermost module lists of a part."""
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _dtypes(part: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in part.parameters() if p.is_floating_point()}
