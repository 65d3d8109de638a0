"""Pretrained checkpoints as fused models, and into fused models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchfuse.checkpoint.building import build_fused_parts, build_model, located
from torchfuse.checkpoint.derived import reinitializers
from torchfuse.checkpoint.formats.registry import read_model_spec
from torchfuse.checkpoint.formats.spec import UNNAMED_KEY
from torchfuse.checkpoint.matching import match_model, match_parts
from torchfuse.checkpoint.published import CheckpointConfig
from torchfuse.checkpoint.streaming import fill
from torchfuse.errors import ConfigError
from torchfuse.io.directory import CheckpointDirectory
from torchfuse.io.torch_file import open_checkpoint
from torchfuse.models.base import FusedModel
from torchfuse.models.types import OnMissing
from torchfuse.naming import unwrap_model
from torchfuse.params import get_fusion_params, parts_of

__all__ = ["from_pretrained", "load_pretrained"]

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
    intermediate_layers: Sequence[int] | None = None,
    decoder_trainable: bool = False,
    encoder_trainable: bool | Mapping[str, bool] = False,
    fusion_trainable: bool = True,
    on_missing: OnMissing | None = None,
    prepare: Callable[[FusedModel], Any] | None = None,
    **fuse_options: Any,
) -> FusedModel:
    """Build a fused model from directories and load it, in one call.

    Either from one directory with a whole model (``save_pretrained``, LLaVA, Llama 3.2 Vision), or from
    a decoder's and an encoder's, which are fused. Memory holds the model and little else.

    Args:
        path: directory of a whole model.
        decoder: directory of a Llama.
        encoder: directory of a vision or audio tower, or of a whole model with one; several by name.
        dtype: of all parameters. None: as in the checkpoint's configuration.
        device: where the model is put. On the meta device no weight is needed: only ``config.json`` is
            read, and a directory that does not exist may have the name of a published checkpoint whose
            sizes are known (``torchfuse.checkpoint.published``).
        max_seq_len: longest sequence. None: as in the checkpoint.
        feature_layer: which hidden state of the tower the features are; by name for named encoders.
        keep_cls: whether the tower's class token is a feature too; by name for named encoders.
        intermediate_layers: for a directory of Llama 3.2 Vision: the layers of the tower after which the
            hidden states are taken that features are projected from. None: as in the checkpoint.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoders train; also ``{name: bool}``.
        fusion_trainable: whether what fusion added trains.
        on_missing: see ``FusedModel``. None: as in the directory of a whole model, else ``"skip"``.
        prepare: called with the model of a whole directory before it has memory, for example
            ``torchfuse.training.shard``, so that no rank ever holds more than its own shard.
        **fuse_options: for ``decoder`` and ``encoder``: the options of ``fuse``, ``arch``, ``every``,
            ``adapter`` and so on.

    Raises:
        ConfigError: for arguments or options that cannot be given together.
        CheckpointError: for a directory that is no checkpoint, a setting that is not supported, or
            tensors that do not fit the configuration, all by name.
    """
    parts = (decoder is not None, encoder is not None)
    if parts != ((True, True) if path is None else (False, False)):
        raise ConfigError(
            "from_pretrained needs the directory of a whole model, or decoder= and encoder=; got "
            f"path={path}, decoder={decoder}, encoder={encoder}."
        )
    place = torch.device(device)
    trainable = {"decoder": decoder_trainable, "encoder": encoder_trainable, "fusion": fusion_trainable}
    features = {"feature_layer": feature_layer, "keep_cls": keep_cls}
    if path is not None:
        why = "the directory of a whole model describes how it is fused"
        _refuse({**features, **fuse_options}, why)
        layers = None if intermediate_layers is None else tuple(intermediate_layers)
        settings = {"max_seq_len": max_seq_len, "intermediate_layers": layers}
        open_path = CheckpointConfig if place.type == "meta" else open_checkpoint
        with open_path(path) as checkpoint:
            return build_model(checkpoint, settings, dtype, place, trainable, on_missing, prepare)
    why = "it is for the directory of a whole model"
    _refuse({"intermediate_layers": intermediate_layers, "prepare": prepare}, why)
    assert decoder is not None
    assert encoder is not None
    folders = encoder if isinstance(encoder, Mapping) else {UNNAMED_KEY: encoder}
    options = {**fuse_options, **{f"{part}_trainable": value for part, value in trainable.items()}}
    options["on_missing"] = on_missing or "skip"
    settings = {"max_seq_len": max_seq_len}
    return build_fused_parts(decoder, folders, settings, features, dtype, place, options)


def _refuse(arguments: Mapping[str, Any], why: str) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} cannot be given: {why}.")


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
    bytes on a terminal. A sharded model takes its own shard of each tensor.

    New tokens that ``fusion_init="mean"`` gave the mean of the old table, and that have not changed
    since, get the mean of the loaded table; so do new rows of the head. Experts that were initialized as
    copies of pretrained weights become copies of the loaded ones, under the same condition.

    Args:
        model: a fused model.
        path: a whole model's checkpoint, for all tensors: a directory of ``save_pretrained``, of LLaVA
            or of Llama 3.2 Vision, or a file with torchtune's or Meta's keys.
        decoder: directory of a Llama (``model.safetensors``, or shards with an index).
        encoder: directory of a CLIP vision tower, of a whole CLIP model, or of whatever tower the
            model's encoder wraps; by name for named encoders, where a name may be left out.
        device: where parts that are on the meta device get their memory.

    Raises:
        ConfigError: for arguments that cannot be given together, or parts that the model does not have.
        CheckpointError: with everything that does not fit: names missing or unexpected, shapes,
            settings. The model is unchanged then.
    """
    model = unwrap_model(model)
    if path is not None:
        _refuse({"decoder": decoder, "encoder": encoder}, "path is the checkpoint of a whole model")
        with open_checkpoint(path) as checkpoint:
            with located(checkpoint):
                spec = read_model_spec(checkpoint, model)
            fill(match_model(model, checkpoint, spec), [model], torch.device(device))
        return
    parts = parts_of(model)
    paths = {"decoder": decoder} if decoder is not None else {}
    if isinstance(encoder, Mapping):
        paths |= {f"encoder.{name}": folder for name, folder in encoder.items()}
    elif encoder is not None:
        paths["encoder"] = encoder
    unknown = [part for part in paths if part not in parts]
    if unknown or not paths:
        raise ConfigError(
            f"There is nothing to load {'into ' + ', '.join(unknown) if unknown else 'from'}: the "
            f"model's parts are {', '.join(parts)}; give a directory for one of them."
        )
    added = {id(p) for p in get_fusion_params(model).values()}
    with ExitStack() as stack:
        directories = {part: stack.enter_context(CheckpointDirectory(p)) for part, p in paths.items()}
        sources = match_parts({n: (parts[n], file) for n, file in directories.items()}, added)
        renew = reinitializers(model, [source.target for source in sources])
        fill(sources, [parts[name] for name in paths], torch.device(device))
    for call in renew:
        call()
