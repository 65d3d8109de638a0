"""Named GPUs: what they compute at most, and how much memory they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GPUS", "Gpu"]


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU.

    Attributes:
        flops: dense bf16 operations a second, with sums in fp32.
        memory: bytes of memory.
    """

    flops: float
    memory: float


GPUS: Final = {
    "A100": Gpu(312e12, 80 * 2**30),
    "H100": Gpu(989e12, 80 * 2**30),
    "H200": Gpu(989e12, 141e9),
    "L40S": Gpu(362e12, 48e9),
    "RTX 4090": Gpu(165e12, 24 * 2**30),
}
"""By name; A100 and H100 with 80 GB, SXM where there are several kinds."""
