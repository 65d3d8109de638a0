"""A fused model from directories: built from what they say of themselves, then loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchfuse.checkpoint.directory import Checkpoint, CheckpointDirectory
from torchfuse.checkpoint.formats import DECODERS, ENCODERS, read_spec
from torchfuse.checkpoint.loading import fill
from torchfuse.checkpoint.model_formats import open_checkpoint, read_model_spec
from torchfuse.checkpoint.pretrained import sources_of_model, sources_of_part
from torchfuse.checkpoint.spec import Spec
from torchfuse.models.base import FusedModel
from torchfuse.models.encoding import OnMissing
from torchfuse.models.fuse import fuse
from torchfuse.options import call_with_options
from torchfuse.params import set_trainable

__all__ = ["from_pretrained"]

PathLike = str | Path


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
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether what fusion added trains.
        on_missing: see ``FusedModel``; what the directory of a whole model says unless given.
        prepare: called with the model of a whole directory before it is read, while it has no memory:
            ``torchfuse.training.shard``, so that every rank only ever holds its own part.
        **fuse_options: for ``decoder`` and ``encoder``: what ``fuse`` takes, ``arch``, ``every``,
            ``adapter`` and so on.

    Raises:
        ValueError: for a directory that is no checkpoint or does not fit what it says of itself, a
            setting that cannot be expressed, by name, or options that do not fit.
    """
    if (path is None) == (decoder is None or encoder is None) or (path is not None and decoder):
        raise ValueError(
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
            raise ValueError(
                f"{', '.join(given)} cannot be given: the directory of a whole model says of itself how "
                "it is fused."
            )
        return _whole(path, dtype, place, max_seq_len, flags, on_missing, prepare)
    if prepare is not None:
        raise ValueError(
            "prepare= is for the directory of a whole model; shard the fused model instead."
        )
    assert decoder is not None
    assert encoder is not None
    folders = dict(encoder) if isinstance(encoder, Mapping) else {"": encoder}
    choices = {"feature_layer": feature_layer, "keep_cls": keep_cls}
    with ExitStack() as stack:
        directory = stack.enter_context(CheckpointDirectory(decoder))
        dtype = dtype or _dtype_of(directory)
        built = _part(directory, DECODERS, dtype, place, {"max_seq_len": max_seq_len})
        towers = {}
        for name, folder in folders.items():
            chosen = {k: v.get(name) if isinstance(v, Mapping) else v for k, v in choices.items()}
            opened = stack.enter_context(CheckpointDirectory(folder))
            towers[name] = _part(opened, ENCODERS, dtype, place, chosen)
    return call_with_options(
        fuse,
        built,
        towers if isinstance(encoder, Mapping) else towers[""],
        what="fuse",
        options={
            **fuse_options,
            "decoder_trainable": decoder_trainable,
            "encoder_trainable": encoder_trainable,
            "fusion_trainable": fusion_trainable,
            "on_missing": on_missing or "skip",
        },
    )


def _part(
    directory: CheckpointDirectory,
    formats: Any,
    dtype: torch.dtype,
    device: torch.device,
    choices: Mapping[str, Any],
) -> nn.Module:
    """A decoder or an encoder, built and loaded."""
    try:
        spec = _chosen(read_spec(directory.config, formats), choices)
    except ValueError as error:
        raise ValueError(f"{directory.path}: {error}") from error
    module = _build(spec, directory, dtype)
    sources, faults = sources_of_part(module, directory, formats, set())
    _refuse(directory, faults)
    fill(sources, [module], device)
    return module.to(device)  # buffers that no checkpoint holds


def _whole(
    path: PathLike,
    dtype: torch.dtype | None,
    device: torch.device,
    max_seq_len: int | None,
    flags: Mapping[str, Any],
    on_missing: OnMissing | None,
    prepare: Callable[[FusedModel], Any] | None,
) -> FusedModel:
    """A whole model, built and loaded."""
    with open_checkpoint(path) as checkpoint:
        try:
            said = read_model_spec(checkpoint)
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {error}") from error
        spec = _chosen(said, {"max_seq_len": max_seq_len})
        model = _build(spec, checkpoint, dtype or _dtype_of(checkpoint))
        assert isinstance(model, FusedModel)
        set_trainable(model, **flags)
        if on_missing is not None:
            model.set_on_missing(on_missing)
        if prepare is not None:
            prepare(model)
        sources, faults = sources_of_model(model, checkpoint, type(spec).of(model))
        _refuse(checkpoint, faults)
        fill(sources, [model], device)
    return model.to(device)


def _chosen(spec: Spec, choices: Mapping[str, Any]) -> Spec:
    """The settings with what the caller wants otherwise."""
    wanted = {name: value for name, value in choices.items() if value is not None}
    if not wanted:
        return spec
    names = {field.name for field in dataclasses.fields(spec)}
    inner = next((n for n in ("decoder", "text", "model") if n in names), None)
    if not wanted.keys() <= names and inner is not None:
        return dataclasses.replace(spec, **{inner: _chosen(getattr(spec, inner), wanted)})
    if unknown := wanted.keys() - names:
        raise ValueError(f"A {spec.name} has no choice of {', '.join(sorted(unknown))}.")
    return dataclasses.replace(spec, **wanted)


def _build(spec: Spec, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Build a module without memory; what computes its own buffers has some."""
    if (layers := spec.depth()) > len(checkpoint):
        raise ValueError(
            f"{checkpoint.path}: config.json speaks of {layers} layers, but there are only "
            f"{len(checkpoint)} tensors."
        )
    try:
        with torch.device("meta"):
            module = spec.build()
    except (RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{checkpoint.path}: no {spec.name} can be built from its config: {error}"
        ) from error
    for parameter in module.parameters():  # parameters only: rotary tables stay exact
        if parameter.is_floating_point() and parameter.dtype != dtype:
            cast = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, cast)
    return module


def _refuse(checkpoint: Checkpoint, faults: list[str]) -> None:
    if faults:
        listing = "\n  ".join(faults)
        raise ValueError(f"{checkpoint.path} does not fit what its config.json says:\n  {listing}")


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What the configuration says, or else the dtype of the first floating tensor."""
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    named = getattr(torch, said, None) if isinstance(said, str) else None
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named
    kinds = (checkpoint.dtype(name) for name in checkpoint)
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)
