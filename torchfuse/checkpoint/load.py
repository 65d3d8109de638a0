"""Pretrained checkpoints into a fused model, unchanged.

Everything is compared before anything is written: every pretrained name must be there once, with its
shape, and nothing else may be; settings that no shape shows (heads, rotary base, epsilons) must agree
with the checkpoint's own configuration. All differences are one error, and the model is as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from torchfuse.checkpoint.formats.loading import Source, fill, find_sources, tensors_of
from torchfuse.checkpoint.formats.models import open_checkpoint, read_model_spec
from torchfuse.checkpoint.formats.parts import DECODERS, ENCODERS, format_of
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint, CheckpointDirectory
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_linear import FusionLinear
from torchfuse.naming import canonical_name, unwrap
from torchfuse.params import get_fusion_params, parts_of

__all__ = ["load_pretrained", "sources_of_model", "sources_of_part"]

_NOTHING: Final = "Nothing was loaded, because not everything fits.\n"

PathLike = str | Path


def load_pretrained(
    model: nn.Module,
    path: PathLike | None = None,
    *,
    decoder: PathLike | None = None,
    encoder: PathLike | Mapping[str, PathLike] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Load a fused model, or pretrained parts of it, from directories.

    Tensors are streamed one by one in the model's dtype to the model's device, with a progress bar by
    bytes where someone looks. A sharded model keeps of each tensor what is its own.

    New tokens that ``fusion_init="mean"`` gave the mean of the table as it was, and that nothing has
    changed since, get the mean of the loaded table; so do new rows of the head. Experts that began as
    copies of pretrained weights become copies of those loaded, under the same condition.

    Args:
        model: a fused model.
        path: a whole model's checkpoint, for all tensors: a directory of ``save_pretrained``, of LLaVA
            or of Llama 3.2 Vision, or a file with torchtune's names.
        decoder: directory of a Llama (``model.safetensors``, or shards with an index).
        encoder: directory of a CLIP vision tower, of a whole CLIP model, or of whatever tower the
            model's encoder wraps; by name for named encoders, where a name may be left out.
        device: where parts that are on the meta device get their memory.

    Raises:
        CheckpointError: with everything that does not fit: names missing or unexpected, shapes,
            settings. The model is as it was then.
    """
    if path is not None:
        if decoder is not None or encoder is not None:
            raise CheckpointError("Give the checkpoint of a whole model, or of its parts, not both.")
        _load_whole(model, path, torch.device(device))
        return
    parts = parts_of(model)
    wanted = {"decoder": decoder} if decoder is not None else {}
    if isinstance(encoder, Mapping):
        wanted |= {f"encoder.{name}": path for name, path in encoder.items()}
    elif encoder is not None:
        wanted["encoder"] = encoder
    unknown = [part for part in wanted if part not in parts]
    if unknown or not wanted:
        raise CheckpointError(
            f"There is nothing to load {'into ' + ', '.join(unknown) if unknown else 'from'}: the "
            f"model's parts are {', '.join(parts)}; give a directory for one of them."
        )
    added = {id(p) for p in get_fusion_params(model).values()}
    with ExitStack() as stack:
        sources: list[Source] = []
        problems: list[str] = []
        for part, path in wanted.items():
            directory = stack.enter_context(CheckpointDirectory(path))
            formats = DECODERS if part == "decoder" else ENCODERS
            found, wrong = sources_of_part(parts[part], directory, formats, added)
            sources += found
            problems += [f"{part} from {directory.path}:\n  " + "\n  ".join(wrong)] if wrong else []
        if problems:
            raise CheckpointError(_NOTHING + "\n".join(problems))
        with _StartsFollow(model, sources):
            fill(sources, [parts[part] for part in wanted], torch.device(device))


def _load_whole(model: nn.Module, path: PathLike, device: torch.device) -> None:
    with open_checkpoint(path) as checkpoint:
        try:
            theirs = read_model_spec(checkpoint, model)
            ours = type(theirs).of(model)
        except ValueError as error:
            raise CheckpointError(f"{_NOTHING}{checkpoint.path}: {error}") from error
        sources, problems = sources_of_model(model, checkpoint, ours)
        problems += [f"config.json: {problem}" for problem in theirs.differences(ours)]
        if problems:
            raise CheckpointError(f"{_NOTHING}{checkpoint.path}:\n  " + "\n  ".join(problems))
        fill(sources, [unwrap(model)], device)


def sources_of_model(
    model: nn.Module, checkpoint: Checkpoint, spec: Spec
) -> tuple[list[Source], list[str]]:
    """Where each tensor of a model comes from, and all that does not fit.

    Args:
        model: a fused model.
        checkpoint: of a whole model.
        spec: the settings of either.
    """
    targets = {canonical_name(name): tensor for name, tensor in tensors_of(unwrap(model)).items()}
    config = checkpoint.config
    tied = any(c.get("tie_word_embeddings") for c in (config, config.get("text_config") or {}))
    return find_sources(targets, checkpoint, spec.table(), tied=tied)


def sources_of_part(
    module: nn.Module, directory: CheckpointDirectory, formats: Sequence[type[Spec]], added: set[int]
) -> tuple[list[Source], list[str]]:
    """Where each pretrained tensor of a part comes from, and all that does not fit.

    Args:
        module: the part.
        directory: the checkpoint.
        formats: those that the part may be of.
        added: what is not pretrained, by ``id``.
    """
    targets = {
        canonical_name(name): tensor
        for name, tensor in tensors_of(unwrap(module)).items()
        if id(tensor) not in added
    }
    try:
        format_ = format_of(module, formats)
        kind = directory.config.get("model_type")
        if not format_.reads(directory.config):
            known = ", ".join(sorted(format_.model_types))
            return [], [f"config.json says model_type {kind!r}; known here: {known}."]
        theirs, ours = format_.from_config(directory.config), format_.of(unwrap(module))
    except ValueError as error:
        return [], [str(error)]
    prefix = ours.prefix_in(directory)
    tied = bool(directory.config.get("tie_word_embeddings"))
    sources, problems = find_sources(targets, directory, ours.table(), tied=tied, prefix=prefix)
    return sources, problems + [f"config.json: {problem}" for problem in theirs.differences(ours)]


class _StartsFollow:
    """What started from pretrained values shall start from those loaded, if nothing has changed it.

    These are new rows that are the mean of the pretrained ones, and experts that are copies of them.
    """

    def __init__(self, model: nn.Module, sources: list[Source]) -> None:
        loaded = {id(source.target) for source in sources}
        self._renew: list[Callable[[], None]] = []
        for module in model.modules():
            if not any(id(p) in loaded for p in module.parameters()):
                continue
            whole: Any = module  # a layer that copies, and rows that average, say so by these methods
            if isinstance(module, FusionEmbedding | FusionLinear):
                if not any(p.is_meta for p in module.parameters()) and whole.new_rows_are_means():
                    self._renew.append(functools.partial(whole.reset_new_rows, "mean"))
            elif (
                callable(getattr(type(module), "experts_are_fresh", None)) and whole.experts_are_fresh()
            ):
                self._renew.append(whole.reset_experts)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for renew in self._renew if kind is None else ():
            renew()
