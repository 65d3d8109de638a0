"""A fused model from directories: built from what they say of themselves, then loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from torchfuse.checkpoint.formats.loading import Source, fill
from torchfuse.checkpoint.formats.models import open_checkpoint, read_model_spec
from torchfuse.checkpoint.formats.parts import DECODERS, ENCODERS, read_spec
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.checkpoint.load import sources_of_model, sources_of_part
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint, CheckpointDirectory
from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.models.types import OnMissing
from torchfuse.options import call_with_options
from torchfuse.params import get_fusion_params, set_trainable

__all__ = ["from_pretrained"]

PathLike = str | Path

_DECODER: Final = ".decoder"  # no encoder can have this name
_ONE: Final = ""  # the name of an encoder without a name


def from_pretrained(
    path: PathLike | None = None,
    *,
    decoder: PathLike | None = None,
    encoder: PathLike | Mapping[str, PathLike] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_seq_len: int | None = None,
    feature_layer: int | Mapping[str, int] | None = None,
    keep_cls: bool | Mapping[str, bool] | None = None,
    intermediate_layers: Sequence[int] | None = None,
    decoder_trainable: bool = False,
    encoder_trainable: bool | Mapping[str, bool] = False,
    fusion_trainable: bool = True,
    on_missing: OnMissing | None = None,
    prepare: Callable[[FusedModel], Any] | None = None,
    **fuse_options: Any,
) -> FusedModel:
    """Build a fused model from directories and load it, in one call.

    Either from one directory that holds a whole model (``save_pretrained``, LLaVA, Llama 3.2 Vision), or
    from a decoder's and an encoder's, which are fused. Memory holds the model and little else.

    Args:
        path: directory of a whole model.
        decoder: directory of a Llama.
        encoder: directory of a vision or audio tower, or of a whole model with one; several by name.
        dtype: of all parameters; what the checkpoint's own configuration says unless given.
        device: where the model shall be.
        max_seq_len: longest sequence, if not the one that the checkpoint names.
        feature_layer: which hidden state of the tower the features are; by name for named encoders.
        keep_cls: whether the tower's class token is a feature too; by name for named encoders.
        intermediate_layers: for a directory of Llama 3.2 Vision: behind which layers of the tower the
            hidden states are taken that features are projected from; what it says unless given.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether what fusion added trains.
        on_missing: see ``FusedModel``; what the directory of a whole model says unless given.
        prepare: called with the model of a whole directory before it is read, while it has no memory:
            ``torchfuse.training.sharding.shard``, so that every rank only ever holds its own part.
        **fuse_options: for ``decoder`` and ``encoder``: what ``fuse`` takes, ``arch``, ``every``,
            ``adapter`` and so on.

    Raises:
        CheckpointError: for a directory that is no checkpoint or does not fit what it says of itself, a
            setting that cannot be expressed, by name, or options that do not fit.
    """
    if (path is None) == (decoder is None or encoder is None) or (path is not None and decoder):
        raise CheckpointError(
            "from_pretrained needs the directory of a whole model, or decoder= and encoder=; got "
            f"path={path}, decoder={decoder}, encoder={encoder}."
        )
    flags: dict[str, Any] = {
        "decoder": decoder_trainable,
        "encoder": encoder_trainable,
        "fusion": fusion_trainable,
    }
    place = torch.device(device)
    if path is not None:
        alone = {"feature_layer": feature_layer, "keep_cls": keep_cls, **fuse_options}
        if given := [name for name, value in alone.items() if value is not None]:
            raise CheckpointError(
                f"{', '.join(given)} cannot be given: the directory of a whole model says of itself how "
                "it is fused."
            )
        layers = None if intermediate_layers is None else tuple(intermediate_layers)
        wanted = {"max_seq_len": max_seq_len, "intermediate_layers": layers}
        return _whole(path, dtype, place, wanted, flags, on_missing, prepare)
    alone = {"intermediate_layers": intermediate_layers, "prepare": prepare}
    if given := [name for name, value in alone.items() if value is not None]:
        raise CheckpointError(
            f"{', '.join(given)} cannot be given: only for the directory of a whole model."
        )
    assert decoder is not None
    assert encoder is not None
    folders = dict(encoder) if isinstance(encoder, Mapping) else {_ONE: encoder}
    choices: dict[str, Any] = {"feature_layer": feature_layer, "keep_cls": keep_cls}
    parts = {_DECODER: (decoder, DECODERS, {"max_seq_len": max_seq_len})}
    for name, folder in folders.items():
        chosen = {k: v.get(name) if isinstance(v, Mapping) else v for k, v in choices.items()}
        parts[name] = (folder, ENCODERS, chosen)
    options = {
        **fuse_options,
        "decoder_trainable": decoder_trainable,
        "encoder_trainable": encoder_trainable,
        "fusion_trainable": fusion_trainable,
        "on_missing": on_missing or "skip",
    }
    return _fused(parts, dtype, place, options)


def _fused(
    parts: Mapping[str, tuple[PathLike, Any, Mapping[str, Any]]],
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any],
) -> FusedModel:
    """A decoder and encoders, each from a directory with its formats and choices, fused."""

    def fused(modules: Mapping[str, nn.Module]) -> FusedModel:
        encoders = {name: module for name, module in modules.items() if name != _DECODER}
        single = list(encoders) == [_ONE]
        given = encoders[_ONE] if single else encoders
        return call_with_options(fuse, modules[_DECODER], given, what="fuse", options=options)

    with ExitStack() as stack:
        directories, specs = {}, {}
        for name, (folder, formats, choices) in parts.items():
            directories[name] = stack.enter_context(CheckpointDirectory(folder))
            specs[name] = _chosen(_read(directories[name], formats), choices)
        dtype = dtype or _dtype_of(directories[_DECODER])
        # First without memory: what does not fit shall show before anything is read.
        fused({name: _build(spec, directories[name], dtype) for name, spec in specs.items()})
        modules = {name: _build(spec, directories[name], dtype) for name, spec in specs.items()}
        sources: list[Source] = []
        problems: list[str] = []
        for name, module in modules.items():
            found, wrong = sources_of_part(module, directories[name], parts[name][1], set())
            sources += found
            problems += [_unfit(directories[name], wrong)] if wrong else []
        if problems:
            raise CheckpointError("\n".join(problems))
        fill(sources, list(modules.values()), device)
    # Buffers that no checkpoint holds have yet to follow.
    return fused({name: module.to(device) for name, module in modules.items()})


def _whole(
    path: PathLike,
    dtype: torch.dtype | None,
    device: torch.device,
    choices: Mapping[str, Any],
    flags: Mapping[str, Any],
    on_missing: OnMissing | None,
    prepare: Callable[[FusedModel], Any] | None,
) -> FusedModel:
    """A whole model, built and loaded."""
    with open_checkpoint(path) as checkpoint:
        spec = _chosen(_read(checkpoint, None), choices)
        model = _build(spec, checkpoint, dtype or _dtype_of(checkpoint))
        assert isinstance(model, FusedModel)
        # A model without any fusion parameter is allowed; the default must not refuse it.
        fusion = flags["fusion"] and bool(get_fusion_params(model))
        set_trainable(model, **{**flags, "fusion": fusion})
        if on_missing is not None:
            model.set_on_missing(on_missing)
        if prepare is not None:
            prepare(model)
        sources, problems = sources_of_model(model, checkpoint, type(spec).of(model))
        if problems:
            raise CheckpointError(_unfit(checkpoint, problems))
        fill(sources, [model], device)
    return model.to(device)


def _read(checkpoint: Checkpoint, formats: Sequence[type[Spec]] | None) -> Spec:
    """The settings of a part in one of these formats, or of a whole model."""
    try:
        return read_spec(checkpoint.config, formats) if formats else read_model_spec(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _chosen(spec: Spec, choices: Mapping[str, Any]) -> Spec:
    """The settings with what the caller wants otherwise."""
    for name, value in choices.items():
        if value is not None:
            chosen = _replace(spec, name, value)
            if chosen is None:
                raise CheckpointError(f"{name} cannot be chosen: a {spec.name} has no such setting.")
            spec = chosen
    return spec


def _replace(spec: Spec, name: str, value: Any) -> Spec | None:
    """The settings with another value of the first setting of this name, in a part where need be."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    if name in fields:
        return dataclasses.replace(spec, **{name: value})
    for part, inner in fields.items():
        if isinstance(inner, Spec) and (chosen := _replace(inner, name, value)) is not None:
            return dataclasses.replace(spec, **{part: chosen})
    return None


def _build(spec: Spec, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Build a module without memory; what computes its own buffers has some."""
    if (layers := spec.depth()) > len(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path}: config.json speaks of {layers} layers, but there are only "
            f"{len(checkpoint)} tensors."
        )
    try:
        with torch.device("meta"):
            module = spec.build()
    except (RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: no {spec.name} can be built from its config: {error}"
        ) from error
    for parameter in module.parameters():  # parameters only: rotary tables stay exact
        if parameter.is_floating_point() and parameter.dtype != dtype:
            cast = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, cast)
    return module


def _unfit(checkpoint: Checkpoint, problems: list[str]) -> str:
    listing = "\n  ".join(problems)
    return f"{checkpoint.path} does not fit what its config.json says:\n  {listing}"


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What the configuration says, or else the dtype that most of the values have."""
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    named = getattr(torch, said, None) if isinstance(said, str) else None
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint:
        sizes[checkpoint.dtype(name)] = sizes.get(checkpoint.dtype(name), 0) + checkpoint.nbytes(name)
    kinds = [kind for kind in sizes if kind.is_floating_point]
    return max(kinds, key=sizes.__getitem__, default=torch.float32)
