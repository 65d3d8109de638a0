"""safetensors files of limited size, and their index.

huggingface_hub's ``split_torch_state_dict_into_shards`` plans such files too, but takes all tensors at
once, where these are made one file at a time, and is no dependency of a base installation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from torchfuse.checkpoint.converting import Output
from torchfuse.checkpoint.tensors import to_safetensors

__all__ = ["write_shards"]


def write_shards(outputs: Sequence[Output], folder: Path, max_size: int | None) -> None:
    """Write tensors in their order, as one file or as several with an index.

    Args:
        outputs: the tensors.
        folder: the directory.
        max_size: largest size of a file in bytes, unless one tensor is larger; None: one file.
    """
    shards: list[list[Output]] = [[]]
    for output in outputs:
        size = sum(other.nbytes for other in shards[-1])
        if shards[-1] and max_size is not None and size + output.nbytes > max_size:
            shards.append([])
        shards[-1].append(output)
    weight_map: dict[str, str] = {}
    total_size = 0
    total = sum(output.nbytes for output in outputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=None) as bar:
        for number, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for output in shard:
                tensors[output.key] = output.make()
                bar.update(output.nbytes)
            save_file(to_safetensors(tensors), folder / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
