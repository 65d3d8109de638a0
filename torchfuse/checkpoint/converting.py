"""A module's tensors as the tensors of a checkpoint: gathered, laid out, merged, padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfuse.checkpoint.formats.key_table import Layout
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.checkpoint.tensors import gather_full, module_tensors
from torchfuse.lora.merge import merged_parameters
from torchfuse.naming import canonical_name
from torchfuse.params import is_sharded

__all__ = ["Output", "plan_outputs"]


@dataclass(frozen=True)
class Output:
    """One tensor of a checkpoint.

    Attributes:
        key: its name in the checkpoint.
        parts: the module's tensors that it is made of, one after the other along the first axis.
        layout: how values are laid out in the checkpoint.
        rows: the number of rows that it is padded to; None: as many as the parts have.
        merged: returns the values of the one part, where LoRA is merged into it.
    """

    key: str
    parts: list[Tensor]
    layout: Layout | None
    rows: int | None
    merged: Callable[[], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes, without padding."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def dtype_name(self) -> str:
        """The dtype, as ``config.json`` has it."""
        return str(self.parts[0].dtype).removeprefix("torch.")

    def make(self) -> Tensor:
        """Return the tensor on the CPU; every rank calls this if the module is sharded.

        Raises:
            ValueError: if the checkpoint's layout cannot represent the values.
        """
        values = (
            [gather_full(part.detach()) for part in self.parts]
            if self.merged is None
            else [self.merged()]
        )
        parts = [part.cpu() for part in values]
        if self.layout is not None:
            parts = [self.layout.to_source(part) for part in parts]
        missing = 0 if self.rows is None else self.rows - sum(part.shape[0] for part in parts)
        if missing > 0:
            mean = parts[0].mean(dim=0, dtype=torch.float32).to(parts[0].dtype)
            parts.append(mean.expand(missing, *mean.shape))
        tensor = torch.cat([part.to(parts[0].dtype) for part in parts]) if len(parts) > 1 else parts[0]
        return tensor.contiguous()


def plan_outputs(module: nn.Module, spec: Spec) -> tuple[list[Output], list[str]]:
    """List the tensors of a checkpoint, and what in the module it cannot hold.

    Args:
        module: a fused model or a part of one.
        spec: the settings of the checkpoint.
    """
    table, rows = spec.key_table(), spec.padded_rows()
    merged = {} if spec.holds_lora else merged_parameters(module, gather_full)
    tensors = {
        name: tensor
        for name, tensor in ((canonical_name(n), t) for n, t in module_tensors(module).items())
        if merged.get(name, tensor) is not None
    }
    appended = {
        origin: name for name, origin in table.appended.items() if name in tensors and origin in tensors
    }
    outputs, problems = [], []
    for name, tensor in tensors.items():
        if name in appended.values():
            continue
        translated = table.to_source(name)
        if translated is None:
            problems.append(f"{name}: the format has no key for it")
            continue
        if tensor.is_meta:
            problems.append(f"{name} is on the meta device")
        quantized = type(tensor.detach()) is not Tensor and not is_sharded(tensor)
        if quantized and name not in merged:
            kind = type(tensor.detach()).__name__
            problems.append(
                f"{name} is quantized ({kind}): call torchfuse.quantization.dequantize first"
            )
        key, layout = translated
        parts = [tensor, tensors[appended[name]]] if name in appended else [tensor]
        output = Output(key, parts, layout, rows.get(name), merged.get(name))
        outputs.append(output)
        if layout is not None and not layout.always_representable:
            try:
                output.make()
            except ValueError as error:
                problems.append(f"{name}: {str(error).rstrip('.')}")
    return outputs, problems
