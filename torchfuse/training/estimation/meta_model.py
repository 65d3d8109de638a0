"""The model of a configuration without its weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchfuse.checkpoint.load import from_pretrained
from torchfuse.components import build, resolve
from torchfuse.errors import ConfigError
from torchfuse.lora.sections import add_lora_sections

__all__ = ["model_on_meta"]


def model_on_meta(
    config: Mapping[str, Any], where: str | Path, dtype: torch.dtype | None = None
) -> nn.Module:
    """Build the model of a configuration on the meta device, with its LoRA layers.

    Args:
        config: the content of the file.
        where: the file, a YAML of a recipe, for messages.
        dtype: of the parameters. None: as in the checkpoint, or torch's default.

    Raises:
        ConfigError: if there is no section ``model``, or the model cannot be built.
        CheckpointError: if a directory that the section names is wrong.
    """
    if not isinstance(config.get("model"), Mapping):
        raise ConfigError(f"{where} has no section model.")
    sys.path.append(os.getcwd())  # components of the user's own, as in recipes
    section, what = dict(config["model"]), f"{where}, model"
    if resolve(section.get("_component_"), what=what) is from_pretrained:
        section |= {"device": "meta"} | ({} if dtype is None else {"dtype": dtype})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device("meta"):
            model: nn.Module = build(section, what=what, kind=nn.Module)
    finally:
        torch.set_default_dtype(before)
    add_lora_sections(model, config.get("lora"), where=f"{where}, ", quantize=False)
    return model
