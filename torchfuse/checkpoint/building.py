"""Fused models built from the settings in checkpoints, then loaded.

Modules are built on the meta device and get their memory tensor by tensor, so that memory holds little
more than the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchfuse.checkpoint.formats.registry import Role, formats_of, read_model_spec, read_spec
from torchfuse.checkpoint.formats.spec import UNNAMED_KEY, Spec
from torchfuse.checkpoint.matching import match_model, match_parts
from torchfuse.checkpoint.published import CheckpointConfig
from torchfuse.checkpoint.streaming import fill
from torchfuse.errors import CheckpointError, ConfigError, FusionError
from torchfuse.io.directory import Checkpoint, CheckpointDirectory
from torchfuse.io.torch_file import open_checkpoint
from torchfuse.models.base import FusedModel
from torchfuse.models.fuse import fuse
from torchfuse.models.types import OnMissing
from torchfuse.options import call_with_options
from torchfuse.params import get_fusion_params, set_trainable

__all__ = ["build_fused_parts", "build_model", "build_on_meta", "located"]


@contextmanager
def located(checkpoint: Checkpoint) -> Iterator[None]:
    """Put the checkpoint's path in front of errors."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def build_model(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    trainable: Mapping[str, Any],
    on_missing: OnMissing | None,
    prepare: Callable[[FusedModel], Any] | None,
) -> FusedModel:
    """Build a whole model and load it.

    Args:
        checkpoint: a checkpoint of a whole model.
        settings: values that replace those in the checkpoint, by name; None: as in the checkpoint.
        dtype: of all parameters; None: as in the checkpoint.
        device: where the model is put; on the meta device nothing is loaded.
        trainable: the arguments of ``set_trainable``.
        on_missing: see ``FusedModel``; None: as in the checkpoint.
        prepare: called with the model before it has memory.
    """
    with located(checkpoint):
        spec = read_model_spec(checkpoint)
    chosen = _with_settings(spec, settings)
    model = _build_on_meta(chosen, checkpoint, dtype or _dtype_of(checkpoint))
    assert isinstance(model, FusedModel)
    # A model without any fusion parameter is allowed; the default must not refuse it.
    fusion = trainable["fusion"] and bool(get_fusion_params(model))
    set_trainable(model, **{**trainable, "fusion": fusion})
    if on_missing is not None:
        model.set_on_missing(on_missing)
    if prepare is not None:
        prepare(model)
    if device.type != "meta":
        fill(match_model(model, checkpoint, chosen), [model], device)
    return model.to(device)


def build_on_meta(path: str | Path) -> tuple[nn.Module, str]:
    """Build the module that a checkpoint's configuration describes, without memory.

    Args:
        path: a checkpoint of a whole model, a decoder or a tower.

    Returns:
        The module on the meta device, and the name of the checkpoint's format.

    Raises:
        CheckpointError: if there is no such checkpoint, or it is in no format that is known.
    """
    with open_checkpoint(path) as checkpoint:
        parts = (*formats_of("decoder"), *formats_of("encoder"))
        models = [
            format_ for format_ in formats_of("model") if format_.matches_config(checkpoint.config)
        ]
        is_part = any(format_.matches_config(checkpoint.config) for format_ in parts)
        with located(checkpoint):
            if is_part and not models:
                spec = read_spec(checkpoint.config, parts)
            else:
                spec = read_model_spec(checkpoint)
        return _build_on_meta(spec, checkpoint, _dtype_of(checkpoint)), spec.name


@dataclass(frozen=True)
class _Part:
    """A pretrained part that is to be built."""

    checkpoint: Checkpoint
    spec: Spec

    @classmethod
    def open(
        cls,
        stack: ExitStack,
        path: str | Path,
        role: Role,
        settings: Mapping[str, Any],
        device: torch.device,
    ) -> _Part:
        open_directory = CheckpointConfig if device.type == "meta" else CheckpointDirectory
        checkpoint = stack.enter_context(open_directory(path))
        with located(checkpoint):
            spec = read_spec(checkpoint.config, formats_of(role))
        return cls(checkpoint, _with_settings(spec, settings))

    def build(self, dtype: torch.dtype) -> nn.Module:
        return _build_on_meta(self.spec, self.checkpoint, dtype)


def build_fused_parts(
    decoder: str | Path,
    encoders: Mapping[str, str | Path],
    decoder_settings: Mapping[str, Any],
    encoder_settings: Mapping[str, Any],
    dtype: torch.dtype | None,
    device: torch.device,
    options: Mapping[str, Any],
) -> FusedModel:
    """Build a decoder and encoders, load them and fuse them.

    Args:
        decoder: the decoder's directory.
        encoders: the encoders' directories by name; ``UNNAMED_KEY`` for one without a name.
        decoder_settings: values that replace those in the checkpoint; None: as in the checkpoint.
        encoder_settings: the same, for every encoder or by name of the encoder.
        dtype: of all parameters; None: as in the decoder's checkpoint.
        device: where the model is put; on the meta device only the configurations are read.
        options: of ``fuse``.

    Raises:
        ConfigError: for settings or options that do not fit.
        CheckpointError: for checkpoints that cannot be built or do not fit their configuration.
    """
    by_encoder = {name: _settings_of(name, encoders, encoder_settings) for name in encoders}

    def fused(modules: list[nn.Module]) -> FusedModel:
        base, *towers = modules
        by_name = dict(zip(encoders, towers, strict=True))
        given = by_name[UNNAMED_KEY] if list(by_name) == [UNNAMED_KEY] else by_name
        return call_with_options(fuse, base, given, what="fuse", options=options)

    with ExitStack() as stack:
        parts = {"decoder": _Part.open(stack, decoder, "decoder", decoder_settings, device)}
        for name, path in encoders.items():
            part = _Part.open(stack, path, "encoder", by_encoder[name], device)
            parts["encoder" if name == UNNAMED_KEY else f"encoder.{name}"] = part
        dtype = dtype or _dtype_of(parts["decoder"].checkpoint)
        # Options that do not fit are reported before any tensor is read.
        model = fused([part.build(dtype) for part in parts.values()])
        if device.type == "meta":
            return model.to(device)
        modules = {name: part.build(dtype) for name, part in parts.items()}
        sources = match_parts({n: (module, parts[n].checkpoint) for n, module in modules.items()})
        fill(sources, modules.values(), device)
    return fused([module.to(device) for module in modules.values()])


def _settings_of(name: str, encoders: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one encoder, some of which may be given by name of the encoder."""
    for key, value in settings.items():
        unknown = value.keys() - set(encoders) if isinstance(value, Mapping) else ()
        if unknown:
            known = ", ".join(filter(None, encoders)) or "one without a name"
            raise ConfigError(f"{key} names {', '.join(sorted(unknown))}; the encoders are: {known}.")
    return {k: v.get(name) if isinstance(v, Mapping) else v for k, v in settings.items()}


def _with_settings(spec: Spec, chosen: Mapping[str, Any]) -> Spec:
    """Return settings with other values, each of the first field with its name, nested ones included.

    Args:
        spec: the settings in a checkpoint.
        chosen: values by name of a field; None: as in the checkpoint.

    Raises:
        ConfigError: for a name that is no field.
    """
    for name, value in chosen.items():
        if value is not None:
            changed = _replace(spec, name, value)
            if changed is None:
                raise ConfigError(f"{name} cannot be given: the format {spec.name} has no such setting.")
            spec = changed
    return spec


def _replace(spec: Spec, name: str, value: Any) -> Spec | None:
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    if name in fields:
        return dataclasses.replace(spec, **{name: value})
    for part, inner in fields.items():
        if isinstance(inner, Spec) and (changed := _replace(inner, name, value)) is not None:
            return dataclasses.replace(spec, **{part: changed})
    return None


def _build_on_meta(spec: Spec, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """Build a module on the meta device; only buffers that it computes itself have memory.

    Args:
        spec: the settings.
        checkpoint: the checkpoint that they are from.
        dtype: of the parameters; buffers, such as rotary tables, keep their own.

    Raises:
        CheckpointError: if the settings cannot be built, or have more layers than there are tensors.
        FusionError: of any kind that the module raises, with the path.
    """
    layers = spec.total_layers()
    if layers > len(checkpoint) and not isinstance(checkpoint, CheckpointConfig):
        raise CheckpointError(
            f"{checkpoint.path}: config.json has {layers} layers, but there are only {len(checkpoint)} "
            "tensors."
        )
    try:
        with torch.device("meta"):
            module = spec.build()
    except FusionError as error:  # its kind stays: the caller may have chosen some of the settings
        raise type(error)(f"{checkpoint.path}: {error}") from error
    except (RuntimeError, OverflowError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its config.json cannot be built as {spec.name}: {error}"
        ) from error
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            cast = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, cast)
    return module


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype in the configuration, or else the one of most bytes."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    sizes: dict[torch.dtype, int] = {}
    for name in checkpoint:
        sizes[checkpoint.dtype(name)] = sizes.get(checkpoint.dtype(name), 0) + checkpoint.nbytes(name)
    floating = [dtype for dtype in sizes if dtype.is_floating_point]
    return max(floating, key=sizes.__getitem__, default=torch.float32)
