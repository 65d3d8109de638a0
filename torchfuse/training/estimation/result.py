"""An estimate, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from torchfuse.training.estimation.gpus import GPUS
from torchfuse.training.estimation.simulate import StepSettings

__all__ = ["Estimate", "gib", "table"]

_WORDS: Final = {
    "loss": "logits and loss, in chunks",
    "backward": "recomputed, and gradients of activations",
    "gathered": "weights gathered from all devices",
    "optimizer": "optimizer states",
    "optimizer.step": "of the optimizer's step",
    "other": "inputs and masks",
}
_SHARDED: Final = ("weights", "gradients", "optimizer")
_SHARE: Final = 0.95  # of a GPU's memory that may be filled


@dataclass(frozen=True)
class Estimate:
    """Parameters, memory and operations of a training; prints as tables.

    Attributes:
        parameters: by part, all and those that train.
        phases: bytes by kind and part, ``"weights.decoder"``, ``"gradients.fusion"``, ``"optimizer"``,
            ``"activations.decoder"``, ``"features"``, ``"loss"``, at the peaks of ``"forward"``,
            ``"backward"`` and ``"optimizer"``, of a single device.
        gathered: bytes of weights that exist as a whole beside shards: two layers, one that runs and one
            that is gathered ahead, and everything outside of layers.
        flops_per_token: operations of forward and backward pass for each position of a row.
        settings: what the step was simulated with.
        devices: on how many weights, gradients and states are sharded.
    """

    parameters: dict[str, tuple[int, int]]
    phases: dict[str, dict[str, int]]
    gathered: int
    flops_per_token: float
    settings: StepSettings
    devices: int = 1

    def on(self, devices: int) -> Estimate:
        """Return the estimate for a number of devices, each with batches of its own."""
        return replace(self, devices=devices)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on each device at the peak of a step, by kind and part."""
        return max(map(self._on_each, self.phases.values()), key=lambda memory: sum(memory.values()))

    @property
    def peak(self) -> float:
        """Bytes on each device at the peak of a step."""
        return sum(self.memory.values())

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes on each device at the peak of each phase."""
        return {name: sum(self._on_each(memory).values()) for name, memory in self.phases.items()}

    def _on_each(self, memory: dict[str, int]) -> dict[str, float]:
        shards = {kind: self.devices if kind.startswith(_SHARDED) else 1 for kind in memory}
        shards["optimizer.step"] = self.devices
        each = {kind: size / shards[kind] for kind, size in memory.items()}
        if self.devices > 1:
            each["gathered"] = self.gathered * (self.devices - 1) / self.devices
        return each

    def tokens_per_second(self, gpu: str) -> float:
        """Return the tokens a second of all devices that no training can exceed.

        Args:
            gpu: a name in ``GPUS``.
        """
        return self.devices * GPUS[gpu].flops / self.flops_per_token

    def __str__(self) -> str:
        return _report(self)


def _report(estimate: Estimate) -> str:
    """Return parameters, memory by part and phase, and bounds for named GPUs."""
    s, peak = estimate.settings, estimate.peak
    parts = [
        (part, f"{total:,}", f"{trained:,}") for part, (total, trained) in estimate.parameters.items()
    ]
    total, trained = (sum(column) for column in zip(*estimate.parameters.values(), strict=True))
    parts.append(("total", f"{total:,}", f"{trained:,}"))
    rows = [
        (_WORDS.get(kind, kind.replace(".", " of ")), gib(size), f"{size / peak:.0%}")
        for kind, size in sorted(estimate.memory.items(), key=lambda item: -item[1])
        if size / peak >= 0.0005
    ]
    rows.append(("peak", gib(peak), "100%"))
    gpus = [
        (
            name,
            gib(gpu.memory),
            "yes" if peak < _SHARE * gpu.memory else "no",
            f"{estimate.tokens_per_second(name):,.0f}",
        )
        for name, gpu in GPUS.items()
    ]
    sharded = f", on each of {estimate.devices} devices" if estimate.devices > 1 else ""
    return "\n\n".join(
        [
            table(("part", "parameters", "trained"), parts),
            f"Batches of {s.batch_size} rows of {s.seq_len:,} tokens, {s.images} images a row, "
            f"{s.supervised:.0%} of the tokens supervised{sharded}.",
            table(("memory at the peak", "GiB", ""), rows),
            "Peaks: " + ", ".join(f"{name} {gib(size)} GiB" for name, size in estimate.peaks.items()),
            f"{estimate.flops_per_token / 1e9:,.1f} GFLOP a token, forward and backward.",
            table(("GPU", "GiB", "fits", "tokens/s at most"), gpus),
        ]
    )


def gib(size: float) -> str:
    """Return a size in GiB."""
    return f"{size / 2**30:,.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for a terminal: the first column to the left, numbers to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
