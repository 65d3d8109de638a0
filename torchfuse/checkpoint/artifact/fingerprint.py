"""Base fingerprints: name, shape, dtype and a hash of sampled values of every pretrained tensor.

Fusion parameters are trained over one base; over another one of the same shapes they load, run and give
wrong results. So an artifact holds the fingerprint of its base. Values are rounded to bfloat16 before
they are hashed: a base in fp32 and the same in bf16 have equal fingerprints. From a sharded tensor each
rank samples its own shard, so that nothing is gathered but the samples.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, distributed, nn

from torchfuse.naming import canonical_name, named_parameters, unwrap_model
from torchfuse.params import fusion_buffers, get_fusion_params, is_sharded

__all__ = [
    "TensorFingerprint",
    "compare_fingerprints",
    "fingerprint",
    "format_differences",
    "pretrained_tensors",
    "read_fingerprint",
]

_SAMPLES: Final = 64
_LISTED: Final = 8
_FLOATING: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Rounded to bfloat16 these two agree; fp16 and fp64 may round differently on the way.
_INTERCHANGEABLE: Final = {"float32", "bfloat16"}
_NOT_HELD: Final = -1  # below every bit pattern


class TensorFingerprint(NamedTuple):
    """Shape, dtype and hash of sampled values of a tensor; None where values cannot be read."""

    shape: list[int]
    dtype: str
    values: str | None

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def pretrained_tensors(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers that fusion did not add, by canonical name.

    Args:
        model: a fused model.
        without: names of parameters to leave out, for example because they train; buffers of the same
            modules, which training changes too, are left out with them.
    """
    added = get_fusion_params(model).keys() | fusion_buffers(model).keys() | set(without)
    training = {name.rpartition(".")[0] for name in without}
    tensors: dict[str, Tensor] = {n: p.detach() for n, p in named_parameters(model) if n not in added}
    for path, module in unwrap_model(model).named_modules():
        owner = canonical_name(path)
        for key, buffer in module.named_buffers(recurse=False):
            name = f"{owner}.{key}" if owner else key
            kept = key not in module._non_persistent_buffers_set and owner not in training
            if kept and name not in added:
                tensors[name] = buffer
    return tensors


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, TensorFingerprint]:
    """Return the fingerprint of each tensor.

    At most 64 values of each are read, evenly spaced from the first to the last. Values of tensors on
    the meta device, of quantized tensors, and of dtypes other than fp64, fp32, bf16 and fp16 are not
    read.

    Args:
        tensors: tensors by name, sharded or not. If any is sharded, every rank calls this with the same
            names, and all get the same result.

    Examples:
        >>> ones = fingerprint({"x": torch.ones(3, 5)})["x"]
        >>> print(ones)
        float32 [3, 5]
        >>> ones.values == fingerprint({"x": torch.ones(3, 5).bfloat16()})["x"].values
        True
        >>> ones.values == fingerprint({"x": torch.zeros(3, 5)})["x"].values
        False
    """
    samples = {name: _samples(tensor) for name, tensor in tensors.items() if _is_readable(tensor)}
    sharded = [sample for name, sample in samples.items() if is_sharded(tensors[name])]
    values = dict(zip(samples, _over_ranks(list(samples.values()), sharded), strict=True))
    return {
        name: TensorFingerprint(
            shape=list(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            values=_hash(values[name]) if name in values else None,
        )
        for name, tensor in tensors.items()
    }


def read_fingerprint(described: Mapping[str, Any]) -> dict[str, TensorFingerprint]:
    """Read a fingerprint from JSON.

    Raises:
        TypeError: if it is none.
    """
    return {str(name): TensorFingerprint(**fields) for name, fields in described.items()}


def compare_fingerprints(
    saved: Mapping[str, TensorFingerprint], own: Mapping[str, TensorFingerprint]
) -> dict[str, str]:
    """Compare the base of an artifact with a model's.

    Values are compared where both could be read, and either both dtypes are the same or one is fp32 and
    the other bf16.

    Args:
        saved: the artifact's.
        own: the model's.

    Returns:
        Differences by name of the tensor. Empty if it is the same base.
    """
    found = {}
    for name, was in saved.items():
        now = own.get(name)
        if now is None:
            found[name] = f"{was} in the saved base, missing here"
        elif now.shape != was.shape:
            found[name] = f"{was} in the saved base, {now} here"
        elif _are_comparable(was, now) and now.values != was.values:
            found[name] = f"{was} in the saved base, {now} with other values here"
    added = {
        name: f"not in the saved base, {now} here" for name, now in own.items() if name not in saved
    }
    return found | added


def format_differences(differences: Mapping[str, str]) -> list[str]:
    """Return differences as lines of a message: how many tensors, and the first few by name."""
    if not differences:
        return []
    count = len(differences)
    differ = "1 pretrained tensor differs" if count == 1 else f"{count} pretrained tensors differ"
    lines = [f"base: {differ} from those that this was trained over"]
    lines += [f"base: {name} is {how}" for name, how in list(differences.items())[:_LISTED]]
    more = count - _LISTED
    return [*lines, f"base: and {more} more"] if more > 0 else lines


def _are_comparable(one: TensorFingerprint, other: TensorFingerprint) -> bool:
    dtypes = {one.dtype, other.dtype}
    return None not in (one.values, other.values) and (len(dtypes) == 1 or dtypes == _INTERCHANGEABLE)


def _is_readable(tensor: Tensor) -> bool:
    if is_sharded(tensor):
        from torch.distributed.tensor import Replicate, Shard

        local = tensor.to_local()
        # With other placements a rank's shard is no box of the tensor.
        if not all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
            return False
    else:
        local = tensor
    plain = type(local) in (Tensor, nn.Parameter)
    return plain and local.dtype in _FLOATING and not local.is_meta


def _samples(tensor: Tensor) -> Tensor:
    """Return bit patterns of sampled values, ``[k]``; ``_NOT_HELD`` for values of another rank."""
    local, offset = _local_box(tensor)
    size, count = tensor.numel(), min(tensor.numel(), _SAMPLES)
    result = torch.full((count,), _NOT_HELD, dtype=torch.int32, device=local.device)
    if not count or local.numel() == 0:
        return result
    places = torch.tensor([i * (size - 1) // max(count - 1, 1) for i in range(count)])
    inside, index = torch.ones(count, dtype=torch.bool), []
    for at, start, length in zip(
        torch.unravel_index(places, tensor.shape or (1,)), offset, local.shape, strict=True
    ):
        inside &= (at >= start) & (at < start + length)
        index.append(at - start)
    own = inside.nonzero().flatten()
    values = local[tuple(at[own].to(local.device) for at in index)]
    bits = values.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    result[own.to(local.device)] = bits
    return result


def _local_box(tensor: Tensor) -> tuple[Tensor, Iterable[int]]:
    """Return this rank's shard of a tensor and its offset."""
    if not is_sharded(tensor):
        local = tensor if tensor.dim() else tensor[None]
        return local, [0] * local.dim()
    local = tensor.to_local()
    if not local.dim():
        return local[None], [0]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return local, offset


def _over_ranks(samples: list[Tensor], sharded: list[Tensor]) -> list[list[int]]:
    if not samples:
        return []
    # One reduction and one copy to the host for all tensors together.
    device = (sharded or samples)[0].device
    joined = torch.cat([sample.to(device) for sample in samples])
    if sharded:
        distributed.all_reduce(joined, op=distributed.ReduceOp.MAX)
    return [part.tolist() for part in joined.cpu().split([len(sample) for sample in samples])]


def _hash(bits: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(bits)}H", *bits)).hexdigest()[:16]
