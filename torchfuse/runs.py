"""What a finetuning run leaves behind, as a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from torch import nn

from torchfuse.checkpoint.fusion_artifact import load_fusion
from torchfuse.checkpoint.pretrained import load_pretrained
from torchfuse.config import build
from torchfuse.data.questions import QuestionTransform

__all__ = ["load_run", "read_yaml"]


def read_yaml(path: str | Path, hint: str) -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        hint: what the file is, for whoever gave the wrong one.

    Raises:
        ValueError: if it cannot be read or is no YAML, naming it.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {hint}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error


def load_run(path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, QuestionTransform]:
    """Build the model of a finetuning run, with its checkpoints and what it learned.

    Args:
        path: the run's ``output_dir``, with ``config.yaml`` and ``fusion/``.
        device: where the model shall be.
        dtype: ``"fp32"`` or ``"bf16"``.

    Returns:
        The model, and the transform that it was trained with.

    Raises:
        ValueError: if the run, or a checkpoint that it names, is not what it should be.
    """
    from torchtune import training
    from torchtune.utils import get_device

    config = read_yaml(Path(path) / "config.yaml", "every finetuning run writes one")
    sections = ("model", "pretrained", "transform")
    if not isinstance(config, dict) or not all(isinstance(config.get(s), dict) for s in sections):
        raise ValueError(f"{path}/config.yaml lacks one of the sections {', '.join(sections)}.")
    transform: QuestionTransform = build(config["transform"], what="transform")
    where = get_device(device)
    with training.set_default_dtype(training.get_dtype(dtype, where)), where:
        model: nn.Module = build(config["model"], what="model")
    load_pretrained(model, **config["pretrained"])
    load_fusion(model, Path(path) / "fusion")
    return model, transform
