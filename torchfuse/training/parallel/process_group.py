"""The process group of a run, on one node or several."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

from torch import distributed

from torchfuse.errors import ConfigError
from torchfuse.io.ranks import coordination_group, from_rank_zero
from torchfuse.training.device import device_and_dtype

__all__ = [
    "check_shared_directory",
    "collective_timeout",
    "init_process_group",
    "launched_world_size",
]

_NUMBERS: Final = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")


def launched_world_size() -> int:
    """Return how many ranks torchrun has launched, by the environment; 1 without torchrun.

    Raises:
        ConfigError: if the environment describes several ranks, and not all that each of them needs.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 1
    problems = [
        f"{name} is {os.environ.get(name, 'not set')}"
        for name in _NUMBERS
        if not os.environ.get(name, "").isdecimal()
    ]
    if not os.environ.get("MASTER_ADDR"):
        problems.append("MASTER_ADDR is not set")
    if not problems and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        problems.append(f"RANK is {os.environ['RANK']} of WORLD_SIZE {os.environ['WORLD_SIZE']}")
    if problems:
        raise ConfigError(
            f"The environment describes several ranks incompletely: {', '.join(problems)}. Launch with "
            "tune run --nproc_per_node (and --nnodes), which sets all of it, or unset WORLD_SIZE."
        )
    return int(os.environ["WORLD_SIZE"])


def init_process_group(device: str, timeout_minutes: float) -> None:
    """Make the process group that torchrun's environment describes.

    Args:
        device: the configured device. On CUDA each rank takes the device of its ``LOCAL_RANK``.
        timeout_minutes: how long a collective operation may take. A minute is added, in which
            ``Watchdog`` reports what every rank does.

    Raises:
        ConfigError: if there is no such device on this rank's machine.
    """
    device_and_dtype(device, "fp32")  # makes it the current device, which NCCL uses
    distributed.init_process_group(timeout=collective_timeout(timeout_minutes))


def collective_timeout(timeout_minutes: float) -> timedelta:
    """Return the time-out of the process groups of a run."""
    return timedelta(minutes=timeout_minutes + 1)


def check_shared_directory(path: str | Path) -> None:
    """Check that a directory is on a disk of all ranks, which write and read checkpoints together.

    Every rank calls this. Nothing is left in the directory.

    Args:
        path: the directory, which need not exist yet.

    Raises:
        ConfigError: naming the ranks and hosts that do not share it with rank zero.
    """
    group = coordination_group()
    if group is None:
        return
    absolute = Path(path).absolute()
    existing = next(p for p in [absolute, *absolute.parents] if p.exists())
    with ExitStack() as cleanup:

        def make_probe() -> str:
            prefix = ".torchfuse_probe_"
            probe = cleanup.enter_context(NamedTemporaryFile(dir=existing, prefix=prefix))
            return Path(probe.name).name

        probe = from_rank_zero(group, make_probe)
        found: list[tuple[str, bool]] = [("", True)] * distributed.get_world_size(group)
        mine = (socket.gethostname(), (existing / probe).exists())
        distributed.all_gather_object(found, mine, group=group)
    missing = [f"rank {rank} on {host}" for rank, (host, exists) in enumerate(found) if not exists]
    if missing:
        raise ConfigError(
            f"{path} is not the same directory on all ranks: {', '.join(missing)} cannot find what rank "
            f"0 on {found[0][0]} wrote there. Give a directory on a disk that all nodes share."
        )
