"""Towers of transformers, built from their configuration: no weights, no network, no foreign code."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from torchfuse.encoders.hf import HfEncoder, computed_buffers
from torchfuse.encoders.hf_towers import AXES
from torchfuse.errors import CheckpointError
from torchfuse.io.strict_json import read_json

__all__ = ["hf_encoder", "saved_names", "tower_config"]

# The encoder half of a model that also has a decoder.
_ENCODERS: Final = {"whisper": ("transformers.models.whisper.modeling_whisper", "WhisperEncoder")}
# Keys by which a file would choose code that is not transformers' own.
_FOREIGN_CODE: Final = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
)


def hf_encoder(
    path_or_config: Any,
    *,
    feature_layer: int | None = None,
    keep_cls: bool | None = None,
    image_size: int | None = None,
    num_special_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> HfEncoder:
    """Build the tower that a checkpoint's ``config.json`` describes, without its weights.

    Nothing is initialised: every parameter is NaN until a checkpoint is loaded, so that a missing tensor
    shows. Under ``torch.device("meta")`` memory is allocated only for buffers that no checkpoint holds.
    A pooler that does not affect the features is left out where the tower's class allows it, and layers
    are never dropped at random. Neither the network nor code from the directory is used.

    Args:
        path_or_config: a directory with a ``config.json``, or a configuration of transformers, of a
            tower or of a whole model, see ``tower_config``.
        feature_layer: see ``HfEncoder``.
        keep_cls: see ``HfEncoder``.
        image_size: see ``HfEncoder``.
        num_special_tokens: see ``HfEncoder``.
        dtype: of the parameters; torch's default dtype unless given.

    Raises:
        ImportError: if transformers is not installed.
        CheckpointError: if there is no tower in the configuration.
        ConfigError: if an argument does not fit the tower.

    Examples:
        >>> from transformers import Dinov2Config
        >>> config = Dinov2Config(
        ...     hidden_size=6, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ... )
        >>> hf_encoder(config, keep_cls=False).num_tokens
        4
    """
    transformers = _transformers()
    config = deepcopy(tower_config(path_or_config))
    kind = config.model_type
    if kind in _ENCODERS:
        module, name = _ENCODERS[kind]
        tower_class = getattr(import_module(module), name)
    elif type(config) in transformers.MODEL_MAPPING:
        tower_class = transformers.MODEL_MAPPING[type(config)]
    else:
        raise CheckpointError(f"transformers has no tower for the configuration of a {kind!r}.")
    if getattr(tower_class, "main_input_name", None) not in AXES:
        raise CheckpointError(f"A {kind!r} ({tower_class.__name__}) is not a vision or audio tower.")
    for name in {"layerdrop", "encoder_layerdrop"} & vars(config).keys():
        setattr(config, name, 0.0)  # all ranks run the same layers, and hidden states can be counted
    pooler = "add_pooling_layer" in inspect.signature(tower_class.__init__).parameters
    tower = _build(tower_class, config, dtype, {"add_pooling_layer": False} if pooler else {})
    return HfEncoder(
        tower,
        feature_layer=feature_layer,
        keep_cls=keep_cls,
        image_size=image_size,
        num_special_tokens=num_special_tokens,
    )


def tower_config(path_or_config: Any) -> Any:
    """Return the configuration of the tower in a checkpoint.

    Args:
        path_or_config: a directory with a ``config.json``, the contents of such a file, or a
            configuration of transformers. Of a whole model's, its ``vision_config`` or
            ``audio_config`` is the tower's.

    Returns:
        A configuration of transformers, whose ``model_type`` is the tower's.

    Raises:
        ImportError: if transformers is not installed.
        CheckpointError: if there is no configuration that transformers can read, or it has two towers.

    Examples:
        >>> from transformers import CLIPConfig
        >>> tower_config(CLIPConfig()).model_type
        'clip_vision_model'
    """
    transformers = _transformers()
    config, source = path_or_config, "The configuration"
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is not a directory, and nothing is downloaded; give a local one."
            )
        config, source = read_json(path / "config.json"), str(path / "config.json")
    if isinstance(config, Mapping):
        values = _without_foreign_code(dict(config))
        kind = values.get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise CheckpointError(f"{source}: transformers has no model_type {kind!r}.")
        try:
            config = transformers.CONFIG_MAPPING[kind].from_dict(values)
        except Exception as error:  # every configuration class raises errors of its own
            reason = " ".join(str(error).split()).rstrip(".")
            raise CheckpointError(f"{source} is not a {kind} configuration: {reason}.") from error
    if not isinstance(config, transformers.PreTrainedConfig):
        raise CheckpointError(
            "A tower is built from a directory or a configuration of transformers, got a "
            f"{type(config).__name__}."
        )
    towers = [name for name in ("vision_config", "audio_config") if getattr(config, name, None)]
    if len(towers) > 1:
        raise CheckpointError(
            f"A {config.model_type!r} has {' and '.join(towers)}: give one of the two."
        )
    return getattr(config, towers[0]) if towers else config


def saved_names(tower: nn.Module) -> dict[str, str]:
    """Map the names of a tower's tensors in memory to their names in a file.

    Since version 5 transformers renames tensors when it loads and saves, so that old files keep their
    names.

    Raises:
        CheckpointError: for a tensor that transformers changes in other ways when it saves.
    """
    state = tower.state_dict()
    names = dict.fromkeys(state, "")
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # versions that rename nothing
        return {name: name for name in names}
    by_id = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(tower, state)
    names |= {by_id[id(tensor)]: key for key, tensor in saved.items() if id(tensor) in by_id}
    if changed := [name for name, key in names.items() if not key]:
        raise CheckpointError(
            f"transformers changes {', '.join(changed[:8])} of a {type(tower).__name__} when it saves "
            "them; such a tower cannot be loaded here."
        )
    return names


def _build(tower_class: Any, config: Any, dtype: torch.dtype | None, options: Any) -> nn.Module:
    """Build a tower with NaN parameters and real values in computed buffers, on the meta device too."""
    from transformers.initialization import no_init_weights

    def make() -> nn.Module:
        with no_init_weights():
            return tower_class(deepcopy(config), **options)

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default)
    try:
        tower = make()
        computed = list(computed_buffers(tower))
        if any(buffer.is_meta for _, _, buffer in computed):
            with torch.device("cpu"):  # parameters are allocated but never written
                real = [buffer for _, _, buffer in computed_buffers(make())]
            for (module, name, _), buffer in zip(computed, real, strict=True):
                module._buffers[name] = buffer
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(torch.nan)
    return tower


def _without_foreign_code(values: Any) -> Any:
    """Return a file's configuration without the keys that make transformers load other code."""
    if not isinstance(values, dict):
        return values
    return {key: _without_foreign_code(v) for key, v in values.items() if key not in _FOREIGN_CODE}


def _transformers() -> ModuleType:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise ImportError("Towers come from transformers: pip install torchfuse[hf].") from error
