"""Training on several devices: sharded or replicated models, and a report of ranks that wait."""

from torchfuse.training.parallel.data_parallel import DataParallel
from torchfuse.training.parallel.layers import checkpoint_activations, compile_layers, layers_of
from torchfuse.training.parallel.options import Parallel
from torchfuse.training.parallel.process_group import (
    check_shared_directory,
    init_process_group,
    launched_world_size,
)
from torchfuse.training.parallel.sharding import shard
from torchfuse.training.parallel.watchdog import Watchdog

__all__ = [
    "DataParallel",
    "Parallel",
    "Watchdog",
    "check_shared_directory",
    "checkpoint_activations",
    "compile_layers",
    "init_process_group",
    "launched_world_size",
    "layers_of",
    "shard",
]
