"""Models and transforms of finetuning runs, and of whole models' directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from omegaconf import OmegaConf
from torch import nn

from torchfuse.checkpoint.artifact.fusion import read_artifact
from torchfuse.checkpoint.artifact.trained import load_trained
from torchfuse.checkpoint.load import from_pretrained, load_pretrained
from torchfuse.components import build
from torchfuse.data.images import ImageTransform, find_processor
from torchfuse.data.samples import Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import CheckpointError, ConfigError, DataError, name_problems
from torchfuse.lora.add import add_described_lora
from torchfuse.lora.merge import merge_lora
from torchfuse.lora.sections import add_lora_sections
from torchfuse.naming import named_parameters, unwrap
from torchfuse.options import call_with_options
from torchfuse.tasks.transforms import find_folder, is_from_pretrained, read_transform
from torchfuse.training.config import read_config
from torchfuse.training.device import device_and_dtype, dtype_by_name

__all__ = [
    "LoadModel",
    "build_model",
    "build_run_model",
    "check_images",
    "check_lengths",
    "load_run",
    "read_model",
    "read_run",
]

_CONFIG: Final = "config.yaml"

LoadModel = Callable[[str, str], tuple[nn.Module, SampleTransform]]
"""Load a model on a device in a dtype, and make its transform."""


def build_model(
    model: Mapping[str, Any], pretrained: Mapping[str, Any], *, device: str, dtype: str, where: str = ""
) -> nn.Module:
    """Build a fused model and load its pretrained parts.

    Args:
        model: the section of a configuration that names and describes the model.
        pretrained: the section that names the directories: arguments of ``load_pretrained``. Nothing
            need be in it if ``model`` is ``torchfuse.from_pretrained``.
        device: the model's device.
        dtype: ``"fp32"`` or ``"bf16"``.
        where: prefix of the sections' names in messages.

    Raises:
        ConfigError: if a section is wrong.
        CheckpointError: if a directory is wrong, or does not fit the model.
    """
    from torchtune import training

    place, precision = device_and_dtype(device, dtype)
    is_loaded = isinstance(model, Mapping) and is_from_pretrained(model, where)
    if is_loaded:
        model = {"device": place, **model, "dtype": _dtype_of_weights(model, precision, where)}
    with training.set_default_dtype(precision), place:
        built: nn.Module = build(model, what=f"{where}model", kind=nn.Module)
    if not is_loaded or any(folder is not None for folder in pretrained.values()):
        call_with_options(load_pretrained, built, what=f"{where}pretrained", options=pretrained)
    return built


def _dtype_of_weights(model: Mapping[str, Any], computed_in: torch.dtype, where: str) -> torch.dtype:
    """Return the dtype that a section ``model`` names, or that of the recipe."""
    named: Any = model.get("dtype")
    if isinstance(named, str):
        named = dtype_by_name(named, f"{where}model.dtype")
    if named is torch.bfloat16 and computed_in is torch.float32:
        raise ConfigError(
            f"{where}model.dtype=bf16 needs dtype=bf16: with fp32 matrices are multiplied in the dtype "
            "of the weights."
        )
    return named or computed_in


def build_run_model(config: Mapping[str, Any], *, device: str, dtype: str, where: str = "") -> nn.Module:
    """Build the model that a finetuning run starts from.

    Args:
        config: the configuration, of which ``model``, ``pretrained``, ``init_from`` and ``lora`` count.
        device: the model's device.
        dtype: ``"fp32"`` or ``"bf16"``.
        where: prefix of the sections' names in messages.

    Raises:
        ConfigError: if a section is wrong.
        CheckpointError: if a directory is wrong, or does not fit the model.
    """
    pretrained = config.get("pretrained") or {}
    model = build_model(config["model"], pretrained, device=device, dtype=dtype, where=where)
    if config.get("init_from") is not None:
        _load_learned(model, config["init_from"], where)
    add_lora_sections(model, config.get("lora"), where=where)
    return model


def _load_learned(model: nn.Module, init_from: str, where: str, later: tuple[Path, ...] = ()) -> None:
    """Load the weights that an earlier run trained over those that it started from; LoRA is merged.

    Args:
        model: the model that both runs start from.
        init_from: the folder of the earlier run, or of an artifact.
        where: prefix of the key's name in messages.
        later: folders of the runs that started from this one.
    """
    folder, key = Path(init_from), f"{where}init_from={init_from}"
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no such folder.")
    if folder.resolve() in later:
        raise ConfigError(f"{key}: this run starts from itself; its folder was written again since.")
    trained = {name for name, parameter in named_parameters(model) if parameter.requires_grad}
    if (folder / "fusion").is_dir():
        config, where = _run_config(folder), f"{folder / _CONFIG}, "
        if config.get("init_from") is not None:
            _load_learned(model, config["init_from"], where, (*later, folder.resolve()))
        adapted = add_lora_sections(model, config.get("lora"), where=where)
        folder = folder / "fusion"
    elif not (folder / "fusion.safetensors").is_file():
        raise ConfigError(
            f"{key} must be the folder of a run that has ended, which has fusion/, or of what "
            "save_trained wrote. A run that has not ended is resumed (resume=true); a whole model is "
            "pretrained.path."
        )
    else:
        adapted = add_described_lora(model, read_artifact(folder).description.get("lora", []))
    load_trained(model, folder)
    if adapted:
        merge_lora(model)
        for name, parameter in named_parameters(model):
            parameter.requires_grad_(name in trained)


def check_images(
    model: nn.Module,
    transform: ImageTransform | None,
    encoder: str | Path | Mapping[str, str | Path] | None,
) -> None:
    """Check that images become what the model's encoders were trained on.

    Args:
        model: a fused model.
        transform: turns images into pixels; None: there are none.
        encoder: the encoders' directories, as for ``load_pretrained``; where they hold an image
            processor, mean and standard deviation are compared too.

    Raises:
        ConfigError: naming each number that differs.
    """
    owner: Any = unwrap(model)
    if transform is None:
        return
    names = list(owner.encoder_names)
    for name in names if len(names) == 1 else ["image"] if "image" in names else []:
        tower: Any = unwrap(owner.get_encoder(name))
        size = getattr(tower, "sides", None) or getattr(tower, "image_size", None)
        folder = encoder.get(name) if isinstance(encoder, Mapping) else encoder
        compared = folder if folder is not None and find_processor(folder) else None
        max_tiles = getattr(tower, "max_num_tiles", None)
        transform.check(size, max_tiles=max_tiles, preprocessor=compared, what=name)


def check_lengths(
    model: nn.Module, transform: SampleTransform, samples: Sequence[Sample], path: str | Path
) -> None:
    """Check that every sample fits the model with its answer, beside the features of its images.

    Args:
        model: a fused model.
        transform: turns samples into sequences.
        samples: samples with answers.
        path: their file, for the message.

    Raises:
        DataError: naming every sample that is too long.
    """
    owner: Any = unwrap(model)
    most, problems = owner.max_seq_len, []
    for number, sample in enumerate(samples, 1):
        length = transform.length(sample)
        if length > most:
            problems.append(
                f"sample {number}: {length} tokens with its answer, and the model's max_seq_len is "
                f"{most}."
            )
    if problems:
        raise DataError(name_problems(path, problems))


def read_run(path: str | Path) -> LoadModel:
    """Read the configuration of a finetuning run.

    Args:
        path: the run's ``output_dir``, with ``config.yaml`` and ``fusion/``.

    Returns:
        A function that loads the model, with what it learned, and its transform.

    Raises:
        ConfigError: if the configuration is wrong.
        CheckpointError: on loading, if a checkpoint is wrong or does not fit.
    """
    config, where = _run_config(Path(path)), f"{Path(path) / _CONFIG}, "
    transform_for = read_transform(config, where=where)

    def load(device: str, dtype: str) -> tuple[nn.Module, SampleTransform]:
        model = build_run_model(config, device=device, dtype=dtype, where=where)
        transform = transform_for(model)
        check_images(model, transform.image_transform, find_folder(config, "encoder"))
        load_trained(model, Path(path) / "fusion")
        return model, transform

    return load


def _run_config(folder: Path) -> dict[str, Any]:
    """Read the configuration that a finetuning run wrote."""
    file = folder / _CONFIG
    given = read_config(file, "every finetuning run writes one")
    config: dict[str, Any] = OmegaConf.to_container(given, resolve=False)
    if not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{file} lacks the section model.")
    return config


def read_model(path: str | Path, transform: Mapping[str, Any] | None = None) -> LoadModel:
    """Find the transform for the directory of a whole model.

    Args:
        path: a directory that ``from_pretrained`` reads.
        transform: the section of a configuration that names and describes the transform; or without
            ``_component_``, keys of the section ``data``, see ``read_transform``.

    Returns:
        A function that loads the model and its transform.

    Raises:
        ConfigError: if the section is wrong.
        CheckpointError: if there is no such directory; on loading, if the checkpoint is wrong.
    """
    if not Path(path).is_dir():
        raise CheckpointError(f"model: {path} is not a directory.")
    section = "transform" if transform and "_component_" in transform else "data"
    config = {"pretrained": {"path": str(path)}, section: transform}
    transform_for = read_transform(config)

    def load(device: str, dtype: str) -> tuple[nn.Module, SampleTransform]:
        place, precision = device_and_dtype(device, dtype)
        model = from_pretrained(path, device=place, dtype=precision, fusion_trainable=False)
        made = transform_for(model)
        check_images(model, made.image_transform, path)
        return model, made

    return load


def load_run(path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, SampleTransform]:
    """Build the model of a finetuning run, with its checkpoints and what it learned.

    Args:
        path: the run's ``output_dir``, with ``config.yaml`` and ``fusion/``.
        device: the model's device.
        dtype: ``"fp32"`` or ``"bf16"``.

    Returns:
        The model, and the transform that it was trained with.

    Raises:
        ConfigError: if the run's configuration is wrong.
        CheckpointError: if a checkpoint is wrong or does not fit.
    """
    return read_run(path)(device, dtype)
