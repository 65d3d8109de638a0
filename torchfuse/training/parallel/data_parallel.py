"""The forward pass of a model that several ranks train, and the reduction of its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torchfuse.naming import find_model
from torchfuse.training.parallel.options import Parallel
from torchfuse.training.parallel.process_group import collective_timeout
from torchfuse.training.parallel.sharding import broadcast_fusion, check_participation, shard

__all__ = ["DataParallel"]


class DataParallel:
    """A model that all ranks train together, by FSDP2, HSDP or DDP; on one rank, the model as it is.

    The model keeps its names and methods; under FSDP2 its parameters are
    sharded in place. Build the optimizer afterwards.

    Args:
        model: a fused model, the same on every rank but for what fusion added, which becomes rank
            zero's.
        options: a section of a configuration, which has no ``problems``.
        device: where the model is.
        dtype: in which matrices are multiplied; FSDP2 gathers the weights of a layer in it.

    Raises:
        ModelError: as ``shard``.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Parallel,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model, self._options = model, options
        self._ddp: DistributedDataParallel | None = None
        self._trained: list[int] = []  # ids of the parameters that DDP reduces
        self._distributed = distributed.is_initialized()
        if self._distributed and options.strategy == "ddp":
            check_participation(model)
            broadcast_fusion(model)
        elif self._distributed:
            self._shard(device, dtype)

    @contextmanager
    def batch(self, *, last: bool) -> Iterator[nn.Module]:
        """Return what to call for the forward pass of a batch; run its backward pass in the context too.

        Args:
            last: whether it is the last batch of an optimizer step, after which gradients are reduced.
        """
        reduce = last or self._options.reduce_every_batch
        if not self._distributed:
            yield self._model
        elif self._options.strategy == "ddp":
            ddp = self._current_ddp()
            ddp.require_backward_grad_sync = reduce  # what no_sync() sets
            yield ddp
        else:
            sharded: Any = find_model(self._model)
            sharded.set_requires_gradient_sync(reduce)
            sharded.set_is_last_backward(last)
            yield self._model

    def _shard(self, device: torch.device, dtype: torch.dtype) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        options: dict[str, Any] = {"reshard_after_forward": self._options.reshard_after_forward}
        if shape := self._options.mesh_shape(distributed.get_world_size()):
            names = ("replicate", "shard")
            options["mesh"] = mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
            # New groups have torch's own time-out. torch 2.9 has the private name only.
            private: Any = distributed.distributed_c10d
            set_timeout = getattr(distributed, "set_timeout", None) or private._set_pg_timeout
            for name in names:
                timeout = collective_timeout(self._options.timeout_minutes)
                set_timeout(timeout, mesh.get_group(name))
        if dtype is not torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        shard(self._model, **options)

    def _current_ddp(self) -> DistributedDataParallel:
        """Return the wrapper that reduces what trains now, which a freeze stage may have changed."""
        trained = [id(p) for p in self._model.parameters() if p.requires_grad]
        if self._ddp is None or trained != self._trained:
            self._ddp = None  # removes its hooks before others are added
            # Every rank has loaded or been sent the same parameters, and no buffer is trained.
            self._ddp = DistributedDataParallel(
                self._model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self._trained = trained
        return self._ddp
