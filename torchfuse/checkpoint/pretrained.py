"""Pretrained checkpoints into a fused model, unchanged.

Everything is compared before anything is written: every pretrained name must be there once, with its
shape, and nothing else may be; settings that no shape shows (heads, rotary base, epsilons) must agree
with the checkpoint's own configuration. All differences are one error, and the model is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from tqdm import tqdm

from torchfuse.checkpoint.clip import CLIP
from torchfuse.checkpoint.directory import CheckpointDirectory
from torchfuse.checkpoint.key_table import Format, Match
from torchfuse.checkpoint.llama import LLAMA
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.naming import canonical_name
from torchfuse.params import get_fusion_params, parts_of

__all__ = ["load_pretrained"]

# By the model_type in config.json.
_DECODERS: Final[dict[str, Format]] = {"llama": LLAMA}
_ENCODERS: Final[dict[str, Format]] = {"clip": CLIP, "clip_vision_model": CLIP}

PathLike = str | Path


@dataclass(frozen=True)
class _Source:
    """Where one tensor of the model comes from."""

    parameter: nn.Parameter
    directory: CheckpointDirectory
    match: Match
    part: nn.Module
    name: str


def load_pretrained(
    model: nn.Module,
    *,
    decoder: PathLike | None = None,
    encoder: PathLike | Mapping[str, PathLike] | None = None,
) -> None:
    """Load pretrained parts of a fused model from Hugging Face directories.

    New tokens that ``fusion_init="mean"`` gave the mean of the table as it was, and that nothing has
    changed since, get the mean of the loaded table.

    Args:
        model: a fused model.
        decoder: directory of a Llama (``model.safetensors``, or shards with an index).
        encoder: directory of a CLIP vision tower or of a whole CLIP model; by name for named
            encoders, where a name may be left out.

    Raises:
        ValueError: with everything that does not fit: names missing or unexpected, shapes, settings.
            The model is as it was then.
    """
    parts = parts_of(model)
    wanted = {"decoder": decoder} if decoder is not None else {}
    if isinstance(encoder, Mapping):
        wanted |= {f"encoder.{name}": path for name, path in encoder.items()}
    elif encoder is not None:
        wanted["encoder"] = encoder
    unknown = [part for part in wanted if part not in parts]
    if unknown or not wanted:
        raise ValueError(
            f"There is nothing to load {'into ' + ', '.join(unknown) if unknown else 'from'}: the "
            f"model's parts are {', '.join(parts)}; give a directory for one of them."
        )
    added = {id(p) for p in get_fusion_params(model).values()}
    with ExitStack() as stack:
        sources: list[_Source] = []
        faults: list[str] = []
        for part, path in wanted.items():
            directory = stack.enter_context(CheckpointDirectory(path))
            formats = _DECODERS if part == "decoder" else _ENCODERS
            found, wrong = _match(parts[part], directory, formats, added)
            sources += found
            faults += [f"{part} from {directory.path}:\n  " + "\n  ".join(wrong)] if wrong else []
        if faults:
            raise ValueError("Nothing was loaded, because not everything fits.\n" + "\n".join(faults))
        # New tokens that start as the mean of the table shall be the mean of the table that is loaded.
        loaded = {id(source.parameter) for source in sources}
        means = [
            module
            for module in model.modules()
            if isinstance(module, FusionEmbedding)
            and id(module.weight) in loaded
            and module.new_rows_are_means()
        ]
        _copy(sources)
        for module in means:
            module.reset_new_rows("mean")


def _match(
    module: nn.Module,
    directory: CheckpointDirectory,
    formats: Mapping[str, Format],
    added: set[int],
) -> tuple[list[_Source], list[str]]:
    """Where each pretrained tensor of a module comes from, and all that does not fit."""
    kind = str(directory.config.get("model_type"))
    if kind not in formats:
        known = ", ".join(sorted(formats))
        return [], [f"config.json says model_type {kind!r}; known here: {known}."]
    format_ = formats[kind]
    ours = {
        canonical_name(name): p
        for name, p in module.named_parameters(remove_duplicate=False)
        if id(p) not in added
    }
    matches, unexpected = format_.translate(directory)
    for name, origin in format_.tied.items():
        if origin not in matches:
            continue
        if name in ours and name not in matches and directory.config.get("tie_word_embeddings"):
            matches[name] = matches[origin]  # one tensor there, two here
        elif name not in ours and name in matches:
            theirs = matches.pop(name)  # two tensors there, one here
            if not torch.equal(*(directory.read(m.source) for m in (theirs, matches[origin]))):
                unexpected.append(theirs.source)
    faults = [f"unexpected: {key}" for key in unexpected]
    faults += [f"unexpected: {m.source}" for name, m in matches.items() if name not in ours]
    faults += [f"missing: {name}" for name in ours if name not in matches]
    sources = []
    for name, parameter in ours.items():
        if name not in matches:
            continue
        match = matches[name]
        if tuple(parameter.shape) != directory[match.source]:
            faults.append(
                f"shape: {match.source} is {list(directory[match.source])}, "
                f"{name} is {list(parameter.shape)}"
            )
        elif parameter.is_meta:
            faults.append(f"{name} is on the meta device: give it memory first (model.to_empty)")
        sources.append(_Source(parameter, directory, match, module, name))
    try:
        faults += [f"config.json: {f}" for f in format_.check_config(directory.config, module)]
    except (AttributeError, KeyError, TypeError) as error:
        faults.append(f"config.json and a {type(module).__name__} cannot be compared: {error!r}")
    return sources, faults


@torch.no_grad()
def _copy(sources: list[_Source]) -> None:
    total = sum(s.parameter.numel() * s.parameter.element_size() for s in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="load", disable=None) as bar:
        for source in sources:
            tensor = source.directory.read(source.match.source)
            if source.match.transform is not None:
                tensor = source.match.transform(tensor, source.part, source.name)
            source.parameter.copy_(tensor)
            bar.update(source.parameter.numel() * source.parameter.element_size())
