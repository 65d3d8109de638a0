"""``torchfuse estimate``: memory and speed of a training, and which change saves how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from torchfuse.training.config import override, read_config
from torchfuse.training.estimation.estimate import estimate
from torchfuse.training.estimation.result import gib, table
from torchfuse.training.estimation.savings import savings

__all__ = ["print_estimate"]


def print_estimate(name: str, overrides: Sequence[str], **options: Any) -> None:
    """Print the estimate of a configuration, and what changes of it would save.

    Args:
        name: a configuration of the finetune recipe, by its name or file.
        overrides: ``key=value``, as on a command line.
        **options: of ``estimate``.

    Raises:
        ConfigError: as ``estimate``.
        CheckpointError: as ``estimate``.
    """
    given = override(read_config(name, "estimate takes the YAML of a training"), overrides)
    config: Any = OmegaConf.to_container(given, resolve=True)
    base = estimate(config, **options)
    print(base, flush=True)
    rows = [
        (change, gib(peak), f"{(peak - base.peak) / 2**30:+,.2f}")
        for change, peak in savings(config, base, **options)
    ]
    print(f"\n{table(('change', 'GiB', ''), rows)}")
