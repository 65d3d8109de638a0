"""Run a function on several gloo ranks; an error on one of them fails the test."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, multiprocessing

# Imported once, by a server from which ranks are forked, instead of by each of them.
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torchtune.models.llama3_2",
    "torchtune.training",
    "torchfuse.models",
    "torchfuse.training",
]


def _rank(rank: int, world_size: int, store: str, function: Callable[..., None], args: Any) -> None:
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # a file is used in their place
    torch.set_num_threads(1)
    torch.manual_seed(17)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
    )
    try:
        function(rank, *args)
    finally:
        distributed.destroy_process_group()


def run_on_ranks(function: Callable[..., None], *args: Any, world_size: int = 2) -> None:
    """Call ``function(rank, *args)`` on each rank; a module-level function, as the processes are new."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank,
            (world_size, f"{folder}/store", function, args),
            nprocs=world_size,
            start_method="forkserver",
        )
