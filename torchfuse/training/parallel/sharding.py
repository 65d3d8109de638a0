"""Sharding of a fused model by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from torchfuse.errors import ModelError
from torchfuse.naming import find_model, named_parameters, unwrap
from torchfuse.params import fusion_buffers, get_fusion_params, is_sharded, parts_of, quantized_dtype
from torchfuse.quantization.plan import first_names
from torchfuse.quantization.schemes import NF4_MULTIPLE
from torchfuse.training.parallel.layers import layers_of

__all__ = ["broadcast_fusion", "check_participation", "shard"]


def shard(model: nn.Module, *, reshard_after_forward: bool | int = True, **options: Any) -> None:
    """Shard a fused model by FSDP2: each transformer layer of decoder and encoders, then the rest.

    A layer that fusion extended is one unit with its fusion layer. Under FSDP2 every rank must run the
    same modules in every step, so fuse with ``on_missing="participate"``. What fusion added starts with
    rank zero's values on every rank, however each was seeded. An encoder of another dtype than the
    decoder's is sharded as a unit of its own. Trainable and frozen parameters are sharded alike, so
    which of them train may change later (see ``torchfuse.params.FreezeSchedule``); gradients are
    reduced of those that train, and units in which nothing trains reduce nothing.

    Args:
        model: a fused model, before its optimizer is built.
        reshard_after_forward: of the layers, as ``fully_shard`` takes it. What is outside of layers,
            such as embedding and head, stays gathered between forward and backward pass.
        **options: for ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.

    Raises:
        ModelError: if there is no layer to shard, a batch without images would block the other ranks,
            NF4 weights cannot be divided by the number of ranks, or the parameters are distributed
            already (by tensor parallelism, for example).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # takes over a second

    model = find_model(model)
    layers = layers_of(model)
    if not layers:
        raise ModelError("There is no layer to shard: no part of the model has an nn.ModuleList.")
    if any(map(is_sharded, model.parameters())):
        raise ModelError(
            "The parameters are distributed already: sharding cannot be applied twice, nor together "
            "with tensor parallelism. Give shard() a mesh of replicas and shards."
        )
    check_participation(model)
    mesh = options.get("mesh")
    _check_nf4(model, distributed.get_world_size() if mesh is None else mesh.size(mesh.ndim - 1))
    broadcast_fusion(model)
    parts = parts_of(model)
    # A unit reduces all of its gradients in one dtype.
    apart = [part for part in parts.values() if _dtypes(part) != _dtypes(parts["decoder"])]
    for layer in layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    for module in [*apart, model]:
        fully_shard(module, **options)
    if hasattr(unwrap(model), "encode"):
        register_fsdp_forward_method(unwrap(model), "encode")  # called beside forward


def check_participation(model: nn.Module) -> None:
    """Raise a ``ModelError`` if a batch without images runs fewer modules than one with images."""
    if getattr(unwrap(find_model(model)), "on_missing", "participate") != "participate":
        raise ModelError(
            'Several ranks need a model with on_missing="participate": without it a rank whose batch '
            "has no image runs fewer modules than the others, and they hang."
        )


def _check_nf4(model: nn.Module, num_shards: int) -> None:
    """Raise a ``ModelError`` if an NF4 weight has other than a multiple of blocks for each rank."""
    wrong = [
        name
        for name, p in named_parameters(model)
        if quantized_dtype(p) == "nf4" and p.numel() // NF4_MULTIPLE % num_shards
    ]
    if wrong:
        raise ModelError(
            f"NF4 weights are sharded in blocks of {NF4_MULTIPLE:,} values, as many on each of "
            f"{num_shards} ranks, which these do not have: {first_names(wrong)}. Use fewer "
            "shards (parallel.shard), parallel.strategy=ddp, or LoRA without quantize_base."
        )


def broadcast_fusion(model: nn.Module) -> None:
    """Give every rank rank zero's values of what fusion added; every rank calls this."""
    for tensor in [*get_fusion_params(model).values(), *fusion_buffers(model).values()]:
        if not tensor.is_meta:
            distributed.broadcast(tensor.detach(), src=0)


def _dtypes(part: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in part.parameters() if p.is_floating_point()}
