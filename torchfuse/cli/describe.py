"""``torchfuse describe``: the parts of a model, without reading a weight."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchfuse.checkpoint.artifact.fusion import read_artifact
from torchfuse.checkpoint.building import build_on_meta
from torchfuse.errors import CheckpointError
from torchfuse.params import FreezeSchedule, read_freeze_meta
from torchfuse.params import describe as describe_model
from torchfuse.training.config import read_sections
from torchfuse.training.config_files import config_names, find_config
from torchfuse.training.estimation.meta_model import model_on_meta

__all__ = ["describe"]

_RUN = "config.yaml"  # what a finetuning run writes into its output directory


def describe(path: str | Path) -> str:
    """Describe the model of a configuration, a finetuning run, an artifact or a checkpoint.

    Args:
        path: a YAML of a recipe with a ``model`` section, or the name of an installed one; the
            ``output_dir`` of a finetuning run, a directory that ``save_fusion`` wrote, or a directory
            (or file) that ``from_pretrained`` or ``load_pretrained`` reads.

    Returns:
        A line that names what was found, and a table of its parts.

    Raises:
        ConfigError: for a configuration without a model, or whose model cannot be built.
        CheckpointError: if the path holds none of these.
    """
    path = find_config(path) if str(path) in config_names() else Path(path)
    if path.suffix in (".yaml", ".yml"):
        return _table(path, "configuration", _from_config(path))
    if (path / _RUN).is_file():
        return _table(path, "finetuning run", _from_config(path / _RUN))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if (path / "fusion.safetensors").is_file():
        return _artifact(path)
    model, format_name = build_on_meta(path)
    return _table(path, f"checkpoint in the format {format_name}", model)


def _table(path: Path, kind: str, model: nn.Module) -> str:
    return f"{path}: {kind}, {type(model).__name__}\n\n{describe_model(model)}"


def _from_config(file: Path) -> nn.Module:
    """Build the model of a configuration on the meta device, with what trains in the first step."""
    config = read_sections(file, "a configuration has a model section", "model", "freeze")
    model = model_on_meta(config, file)
    FreezeSchedule(read_freeze_meta(config.get("freeze") or [])).apply(model, 0)
    return model


def _artifact(path: Path) -> str:
    artifact = read_artifact(path)
    parameters = sum(tensor.numel() for tensor in artifact.tensors.values())
    size = sum(tensor.nbytes for tensor in artifact.tensors.values())
    base = artifact.base
    lines = {
        "architecture": artifact.description.get("architecture"),
        "options": artifact.description.get("options"),
        "adapters": artifact.description.get("adapters"),
        "tensors": f"{len(artifact.tensors):,}, {parameters:,} parameters, {size:,} bytes",
        "base": "not recorded" if base is None else f"{len(base):,} pretrained tensors",
    }
    width = max(map(len, lines))
    rows = [f"{name:<{width}}  {value}" for name, value in lines.items() if value]
    return "\n".join([f"{path}: artifact of what fusion added", "", *rows])
