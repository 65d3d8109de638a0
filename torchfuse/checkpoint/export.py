"""A fused model as a directory: the world's formats where they can hold it, ours where not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from torchfuse.checkpoint.artifact.fusion import whole
from torchfuse.checkpoint.formats.key_table import KeyTable, Layout
from torchfuse.checkpoint.formats.loading import tensors_of
from torchfuse.checkpoint.formats.models import spec_to_export
from torchfuse.errors import CheckpointError
from torchfuse.io.atomic import contains_only_checkpoint_files, write_directory
from torchfuse.io.ranks import is_rank_zero
from torchfuse.naming import canonical_name, model_behind

__all__ = ["export", "save_pretrained"]


def save_pretrained(model: nn.Module, path: str | Path, *, files: Sequence[str | Path] = ()) -> None:
    """Write a fused model as one directory that ``from_pretrained`` reads back.

    Args:
        model: a fused model.
        path: see ``export``.
        files: see ``export``.

    Raises:
        CheckpointError: as ``export``.
    """
    export(model, path, format="torchfuse", files=files)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,  # what people call it
    files: Sequence[str | Path] = (),
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a fused model as a directory in a format of others, or in torchfuse's own.

    The directory appears whole or not at all; one that holds a checkpoint is replaced at once. New
    tokens are merged into the tables, tied heads stay tied. Where a table must have more rows than the
    model has, they are the mean of the pretrained ones. On a sharded model every rank calls this and
    rank zero writes.

    Args:
        model: a fused model (a ``VLMWrapper`` counts as the one that it is a face of), or a part of one.
        path: the directory.
        format: ``"llava"`` or ``"mllama"``, which transformers loads; ``"torchtune"``, one file that
            torchtune's checkpointers load; ``"torchfuse"``, which holds any model. For a part alone,
            ``model.decoder`` or ``model.encoder``: ``"llama"``, ``"clip"``, or ``"hf"`` for a tower of
            transformers.
        files: what to copy beside: tokenizer, preprocessor.
        max_shard_size: bytes of a file at most, unless one tensor is larger.

    Raises:
        CheckpointError: for an unknown format, or a model that it cannot hold: which part, and which
            formats can; for a file that is missing. Nothing is written then.
    """
    model = model_behind(model)
    path, copies = Path(path), [Path(file) for file in files]
    spec = spec_to_export(format, model)
    outputs, problems = _outputs(model, spec.table(), spec.rows())
    names = [file.name for file in copies]
    problems += [f"the file {file} does not exist" for file in copies if not file.is_file()]
    taken = {name for name in names if name == "config.json" or name.startswith("model")}
    problems += [
        f"a file {name} cannot be copied beside, the format has its own" for name in sorted(taken)
    ]
    if problems:
        raise CheckpointError(spec.cannot_hold(problems))
    dtype = str(outputs[0].parts[0].dtype).removeprefix("torch.")
    config = {**spec.to_config(), "dtype": dtype}
    shards = _shards(outputs, max_shard_size if spec.may_be_sharded else None)

    def write(folder: Path) -> None:
        for file in copies:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_shards(shards, folder)

    def may_replace(folder: Path) -> bool:
        return contains_only_checkpoint_files(folder, besides=names)

    if is_rank_zero():
        write_directory(path, write, may_replace=may_replace)
    else:
        _write_shards(shards, None)


@dataclass(frozen=True)
class _Output:
    """One tensor of theirs, made of ours."""

    key: str
    parts: list[Tensor]
    layout: Layout | None
    rows: int | None

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    def make(self) -> Tensor:
        """Gather, lay out, merge, fill up."""
        parts = [whole(part.detach()).cpu() for part in self.parts]
        if self.layout is not None:
            parts = [self.layout.write(part) for part in parts]
        missing = 0 if self.rows is None else self.rows - sum(part.shape[0] for part in parts)
        if missing > 0:
            mean = parts[0].mean(dim=0, dtype=torch.float32).to(parts[0].dtype)
            parts.append(mean.expand(missing, *mean.shape))
        tensor = torch.cat([part.to(parts[0].dtype) for part in parts]) if len(parts) > 1 else parts[0]
        return tensor.contiguous()


def _outputs(model: nn.Module, table: KeyTable, rows: dict[str, int]) -> tuple[list[_Output], list[str]]:
    """What is written, and what of the model has no place there."""
    tensors = {canonical_name(n): t for n, t in tensors_of(model).items()}
    behind = {
        origin: name for name, origin in table.appended.items() if name in tensors and origin in tensors
    }
    outputs, problems = [], []
    for name, tensor in tensors.items():
        if name in behind.values():
            continue
        translated = table.write(name)
        if translated is None:
            problems.append(f"{name}: it has no name for it")
            continue
        if tensor.is_meta:
            problems.append(f"{name} is on the meta device")
        if type(tensor.detach()) not in (Tensor, torch.distributed.tensor.DTensor):
            problems.append(f"{name} is quantized ({type(tensor.detach()).__name__})")
        parts = [tensor, tensors[behind[name]]] if name in behind else [tensor]
        outputs.append(_Output(translated[0], parts, translated[1], rows.get(name)))
        if translated[1] is not None and not translated[1].holds_all:
            try:
                outputs[-1].make()
            except ValueError as error:
                problems.append(f"{name}: {str(error).rstrip('.')}")
    return outputs, problems


def _shards(outputs: list[_Output], max_size: int | None) -> list[list[_Output]]:
    shards: list[list[_Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and max_size is not None and size + output.nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def _write_shards(shards: list[list[_Output]], folder: Path | None) -> None:
    """Write every shard and their index; without a folder, only help to gather."""
    names = list(_shard_names(len(shards)))
    weight_map: dict[str, str] = {}
    size = 0
    total = sum(output.nbytes for shard in shards for output in shard)
    disable = True if folder is None else None
    with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=disable) as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors: dict[str, Tensor] = {}
            for output in shard:
                tensor = output.make()
                if folder is not None:
                    tensors[output.key] = tensor
                bar.update(output.nbytes)
            if folder is not None:
                save_file(_apart(tensors), folder / name, {"format": "pt"})
                weight_map |= dict.fromkeys(tensors, name)
                size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if folder is not None and len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shard_names(count: int) -> Iterator[str]:
    if count == 1:
        yield "model.safetensors"
    else:
        for number in range(1, count + 1):
            yield f"model-{number:05d}-of-{count:05d}.safetensors"


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as a file wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart
