"""How the ranks of a run share a model, as a section of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = ["Parallel"]

_STRATEGIES: Final = ("fsdp", "ddp")
_LAUNCH: Final = "launch with tune run --nproc_per_node (and --nnodes)"


@dataclass
class Parallel:
    """Several devices, with one rank on each.

    Attributes:
        strategy: ``fsdp`` shards weights, gradients and optimizer states over the ranks (FSDP2); ``ddp``
            has all of them on every rank, for small models.
        shard: ranks that share one copy of the model, with ``fsdp``; null: all, divided by
            ``replicate``.
        replicate: copies of the model with ``fsdp`` (HSDP), such as one on each node; null: all ranks,
            divided by ``shard``.
        reshard_after_forward: whether ``fsdp`` frees the weights of a layer between forward and backward
            pass; false needs more memory and less communication.
        reduce_every_batch: whether gradients are reduced after each batch of a step, not once a step:
            more communication, and no whole gradients on any rank with ``fsdp``.
        timeout_minutes: how long one part of a step may take; a run in which a rank waits for longer
            ends, and what every rank does is printed.
        tensor: ranks of tensor parallelism, which is not implemented: 1.
        context: ranks of context parallelism, which is not implemented: 1.
    """

    strategy: str = "fsdp"
    shard: int | None = None
    replicate: int | None = None
    reshard_after_forward: bool = True
    reduce_every_batch: bool = False
    timeout_minutes: float = 30.0
    tensor: int = 1
    context: int = 1

    def problems(self, world_size: int, device: str) -> Iterator[str]:
        """Yield a phrase for each key that is out of range or does not fit the launch.

        Args:
            world_size: number of ranks of the run.
            device: the configured device.

        Examples:
            >>> list(Parallel(shard=4).problems(2, "cuda"))[0].partition(";")[0]
            'parallel.shard=4 must divide the number of ranks, 2'
        """
        if self.strategy not in _STRATEGIES:
            yield f"parallel.strategy={self.strategy} must be one of {', '.join(_STRATEGIES)}"
        if not self.timeout_minutes > 0:
            yield f"parallel.timeout_minutes={self.timeout_minutes} must be above 0"
        if self.tensor != 1:
            yield (
                f"parallel.tensor={self.tensor}: tensor parallelism is not implemented; use "
                "parallel.strategy=fsdp, with activation_checkpointing=true or a quantized base (QLoRA) "
                "if it still does not fit"
            )
        if self.context != 1:
            yield (
                f"parallel.context={self.context}: context parallelism is not implemented; use "
                "activation_checkpointing=true, activation_offloading=true or a smaller "
                "data.max_seq_len"
            )
        yield from self._mesh_problems(world_size)
        if world_size > 1 and device.startswith("mps"):
            yield f"device={device} has no communication between processes; run one process"
        if world_size > 1 and ":" in device:
            kind = device.partition(":")[0]
            yield f"device={device} is one device for {world_size} ranks; device={kind}: each its own"

    def mesh_shape(self, world_size: int) -> tuple[int, int] | None:
        """Return the numbers of replicas and of shards; None where all ranks share one copy.

        Examples:
            >>> Parallel(shard=4).mesh_shape(8), Parallel().mesh_shape(8)
            ((2, 4), None)
        """
        shard = self.shard or world_size // (self.replicate or 1)
        return None if shard == world_size else (world_size // shard, shard)

    def _mesh_problems(self, world_size: int) -> Iterator[str]:
        given = {"shard": self.shard, "replicate": self.replicate}
        sizes = {f"parallel.{name}": size for name, size in given.items() if size is not None}
        if sizes and self.strategy == "ddp":
            yield f"{', '.join(sizes)} are for parallel.strategy=fsdp, got ddp"
            return
        if small := [f"{name}={size}" for name, size in sizes.items() if size < 1]:
            yield f"{', '.join(small)} must be at least 1"
            return
        for name, size in sizes.items():
            if world_size % size:
                yield f"{name}={size} must divide the number of ranks, {world_size}; {_LAUNCH}"
                return
        if self.shard and self.replicate and self.shard * self.replicate != world_size:
            yield (
                f"parallel.shard={self.shard} times parallel.replicate={self.replicate} must be the "
                f"number of ranks, {world_size}; {_LAUNCH}"
            )
