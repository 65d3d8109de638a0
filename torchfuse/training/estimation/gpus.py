"""Peak operations per second and memory of GPUs by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["GPUS", "Gpu", "gpu_named"]


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU.

    Attributes:
        flops: dense bf16 operations a second, with sums in fp32.
        memory: bytes of memory.
        device_names: what ``torch.cuda.get_device_name`` returns for it and for kinds of it that compute
            as much.
    """

    flops: float
    memory: float
    device_names: tuple[str, ...]


_A100: Final = (
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100 80GB PCIe",
    "NVIDIA A100-PCIE-40GB",
)
GPUS: Final = {
    "A100": Gpu(312e12, 80 * 2**30, _A100),
    "H100": Gpu(989e12, 80 * 2**30, ("NVIDIA H100 80GB HBM3",)),
    "H200": Gpu(989e12, 141e9, ("NVIDIA H200",)),
    "L40S": Gpu(362e12, 48e9, ("NVIDIA L40S",)),
    "RTX 4090": Gpu(165e12, 24 * 2**30, ("NVIDIA GeForce RTX 4090",)),
}
"""By name; A100 and H100 with 80 GB, SXM where there are several kinds."""


def gpu_named(device_name: str) -> Gpu | None:
    """Return the GPU of a name of ``torch.cuda.get_device_name``; None if it is not known.

    Part of a GPU (MIG) has another name, and is not known.

    Examples:
        >>> gpu_named("NVIDIA H100 80GB HBM3").flops, gpu_named("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
        (989000000000000.0, None)
    """
    return next((gpu for gpu in GPUS.values() if device_name in gpu.device_names), None)
