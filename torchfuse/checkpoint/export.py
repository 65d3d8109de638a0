"""Fused models as directories: in the formats of other libraries, or in torchfuse's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from torchfuse.checkpoint.converting import plan_outputs
from torchfuse.checkpoint.formats.registry import spec_to_export
from torchfuse.checkpoint.shards import write_shards
from torchfuse.io.atomic import contains_only_checkpoint_files, write_directory
from torchfuse.io.ranks import is_rank_zero
from torchfuse.naming import unwrap_model

__all__ = ["export", "save_pretrained"]


def save_pretrained(model: nn.Module, path: str | Path, *, files: Sequence[str | Path] = ()) -> None:
    """Write a fused model as one directory that ``from_pretrained`` reads back.

    Args:
        model: a fused model.
        path: the directory, as for ``export``.
        files: files that are copied into the directory, as for ``export``.

    Raises:
        CheckpointError: as ``export``.
    """
    export(model, path, format="torchfuse", files=files)


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    files: Sequence[str | Path] = (),
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a fused model as a directory in the format of another library, or in torchfuse's own.

    The directory appears complete or not at all; one that holds a checkpoint is replaced in one step.
    New tokens are merged into the tables, tied heads stay tied. Where a table must have more rows than
    the model has, they are the mean of the pretrained ones. On a sharded model every rank calls this and
    rank zero writes. Memory holds, besides the model, one file's tensors.

    Args:
        model: a fused model (of a ``VLMWrapper``, the model that it wraps), or a part of one.
        path: the directory.
        format: ``"llava"`` or ``"mllama"``, which transformers loads; ``"torchtune"``, one file that
            torchtune's checkpointers load; ``"torchfuse"``, which holds any model. For a part alone,
            ``model.decoder`` or ``model.encoder``: ``"llama"``, ``"clip"``, or ``"hf"`` for a tower of
            transformers.
        files: files that are copied into the directory: tokenizer, preprocessor.
        max_shard_size: largest size of a file in bytes, unless one tensor is larger.

    Raises:
        ConfigError: for an unknown format.
        CheckpointError: for a model that the format cannot hold: which part, and which formats can; for
            a file that is missing. In both cases nothing is written.
    """
    model = unwrap_model(model)
    path, copies = Path(path), [Path(file) for file in files]
    spec = spec_to_export(format, model)
    outputs, problems = plan_outputs(model, spec)
    names = [file.name for file in copies]
    problems += [f"the file {file} does not exist" for file in copies if not file.is_file()]
    taken = {name for name in names if name == "config.json" or name.startswith("model")}
    problems += [f"a file {name} cannot be copied, the format has its own" for name in sorted(taken)]
    if problems:
        raise spec.cannot_hold(problems)
    config = {**spec.to_config(), "dtype": outputs[0].dtype_name}
    max_size = max_shard_size if spec.may_be_sharded else None

    def write(folder: Path) -> None:
        for file in copies:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_shards(outputs, folder, max_size)

    def may_replace(folder: Path) -> bool:
        return contains_only_checkpoint_files(folder, besides=names)

    if is_rank_zero():
        write_directory(path, write, may_replace=may_replace)
    else:  # the other ranks take part in gathering
        for output in outputs:
            output.make()
