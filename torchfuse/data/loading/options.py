"""How samples become batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch

from torchfuse.data.documents import ImageLayout
from torchfuse.data.encoder_items import ItemFormats
from torchfuse.data.truncate import TooLong

__all__ = ["Encoder", "LoaderOptions"]


class Encoder(Protocol):
    """Turn a sample into a sequence; ``SampleTransform`` is one."""

    pad_id: int
    layout: ImageLayout
    max_seq_len: int | None
    formats: ItemFormats

    def __call__(self, sample: Any) -> dict[str, Any]:
        """Return the sequence, as the collator takes it."""

    def length(self, sample: Any) -> int:
        """Return the positions that a sample takes, without opening images."""


@dataclass(frozen=True)
class LoaderOptions:
    """How samples become batches.

    Attributes:
        batch_size: rows of a batch on each rank.
        batches_per_step: batches whose gradients are accumulated.
        epochs: passes over the samples; each drops the rows after its last whole step.
        max_steps: the most steps.
        max_seq_len: length of packed rows, and of the longest sample that is used whole. None: the
            transform's.
        packed: whether several samples share a row.
        too_long: what happens to a longer sample, see ``pack``.
        bad_samples: what happens to a sample that cannot be used: ``"error"``, or ``"skip"``: it is left
            out, and listed in ``StepLoader.skipped``.
        num_workers: processes that read samples; 0: this one does.
        prefetch_factor: batches that each worker reads ahead.
        start_method: how workers start: ``"fork"``, ``"spawn"``, ``"forkserver"``; None: as Python does.
        pin_memory: whether batches are in pinned memory, for a faster copy to a GPU.
        seed: of the order.
    """

    batch_size: int = 1
    batches_per_step: int = 1
    epochs: int = 1
    max_steps: int | None = None
    max_seq_len: int | None = None
    packed: bool = False
    too_long: TooLong = "drop"
    bad_samples: Literal["error", "skip"] = "error"
    num_workers: int = 0
    prefetch_factor: int = 2
    start_method: str | None = None
    pin_memory: bool = False
    seed: int = 0

    def problems(self) -> list[str]:
        """Return what is out of range."""
        least = {"batch_size": 1, "batches_per_step": 1, "epochs": 1, "num_workers": 0, "max_steps": 1}
        least |= {"prefetch_factor": 1, "max_seq_len": 1}
        given = {name: getattr(self, name) for name in least}
        problems = [
            f"{name}={value} must be at least {least[name]}"
            for name, value in given.items()
            if value is not None and value < least[name]
        ]
        if self.packed and self.max_seq_len is None:
            problems.append("packed=True needs max_seq_len, the length of packed rows")
        if self.bad_samples not in ("error", "skip"):
            problems.append(f'bad_samples must be "error" or "skip", got {self.bad_samples!r}')
        if self.too_long not in get_args(TooLong):
            problems.append(
                f"too_long must be one of {', '.join(get_args(TooLong))}, got {self.too_long!r}"
            )
        methods = torch.multiprocessing.get_all_start_methods()
        if self.start_method not in (None, *methods):
            problems.append(f"start_method must be {', '.join(methods)}, got {self.start_method!r}")
        return problems

    def workers(self, number: int) -> dict[str, Any]:
        """Return the arguments of a ``DataLoader`` with a number of worker processes."""
        if not number:
            return {}
        return {
            "num_workers": number,
            "prefetch_factor": self.prefetch_factor,
            "multiprocessing_context": self.start_method,
        }
