"""A table of a model's parts: tensors, parameters, what trains, dtype and device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from torchfuse.params.parts import partition
from torchfuse.params.storage import dtype_name, quantized_dtype

__all__ = ["Description", "PartSummary", "describe"]


@dataclass(frozen=True)
class PartSummary:
    """Counts of one part of a model: tensors, parameters, parameters that train; dtype, device."""

    part: str
    tensors: int
    parameters: int
    trainable: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Description:
    """The summaries of a model's parts, and of their total; prints as a table."""

    parts: tuple[PartSummary, ...]

    def __iter__(self) -> Iterator[PartSummary]:
        return iter(self.parts)

    def __getitem__(self, part: str) -> PartSummary:
        return {row.part: row for row in self.parts}[part]

    def __str__(self) -> str:
        header = ("part", "tensors", "parameters", "trainable", "dtype", "device")
        rows = [
            (r.part, f"{r.tensors:,}", f"{r.parameters:,}", _share(r), r.dtype, r.device)
            for r in self.parts
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def describe(model: nn.Module) -> Description:
    """Return a table of the parts of a model: tensors, parameters, what trains, dtype and device.

    Args:
        model: a fused model.

    Returns:
        Rows for every part and a last one, ``"total"``; ``print(describe(model))`` shows them.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> describe(FusionEmbedding(11, 2, 3))["fusion"].parameters
        6
    """
    groups = partition(model)
    rows = [_summary(part, list(parameters.values())) for part, parameters in groups.items()]
    total = _summary("total", [p for parameters in groups.values() for p in parameters.values()])
    return Description((*rows, total))


def _summary(part: str, parameters: list[nn.Parameter]) -> PartSummary:
    return PartSummary(
        part=part,
        tensors=len(parameters),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        dtype=", ".join(sorted({quantized_dtype(p) or dtype_name(p) for p in parameters})) or "-",
        device=", ".join(sorted({str(p.device) for p in parameters})) or "-",
    )


def _share(row: PartSummary) -> str:
    if not row.trainable:
        return "0"
    return f"{row.trainable:,} ({100 * row.trainable / row.parameters:.1f} %)"
