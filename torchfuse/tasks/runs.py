"""Models and transforms of finetuning runs, and of whole models' directories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from torchfuse.checkpoint.artifact.trained import load_trained
from torchfuse.checkpoint.load import from_pretrained, load_pretrained
from torchfuse.components import build
from torchfuse.data.images import ImageTransform, find_processor
from torchfuse.data.questions import Question, QuestionTransform, name_problems
from torchfuse.errors import CheckpointError, DataError
from torchfuse.generation.caches import room_for_text
from torchfuse.naming import unwrap
from torchfuse.options import call_with_options
from torchfuse.training.config import read_config
from torchfuse.training.device import device_and_dtype

__all__ = [
    "ModelSource",
    "build_model",
    "check_images",
    "check_lengths",
    "load_run",
    "read_model",
    "read_run",
]


def build_model(
    model: Mapping[str, Any], pretrained: Mapping[str, Any], *, device: str, dtype: str, where: str = ""
) -> nn.Module:
    """Build a fused model and load its pretrained parts.

    Args:
        model: the section of a configuration that names and describes the model.
        pretrained: the section that names the directories: arguments of ``load_pretrained``.
        device: the model's device.
        dtype: ``"fp32"`` or ``"bf16"``.
        where: prefix of the sections' names in messages.

    Raises:
        ConfigError: if a section is wrong.
        CheckpointError: if a directory is wrong, or does not fit the model.
    """
    from torchtune import training

    place, precision = device_and_dtype(device, dtype)
    with training.set_default_dtype(precision), place:
        built: nn.Module = build(model, what=f"{where}model", kind=nn.Module)
    call_with_options(load_pretrained, built, what=f"{where}pretrained", options=pretrained)
    return built


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
    for name in owner.encoder_names:
        tower: Any = unwrap(owner.get_encoder(name))
        size = getattr(tower, "sides", None) or getattr(tower, "image_size", None)
        folder = encoder.get(name) if isinstance(encoder, Mapping) else encoder
        compared = folder if folder is not None and find_processor(folder) else None
        max_tiles = getattr(tower, "max_num_tiles", None)
        transform.check(size, max_tiles=max_tiles, preprocessor=compared, what=name)


def check_lengths(
    model: nn.Module, transform: QuestionTransform, questions: Sequence[Question], path: str | Path
) -> None:
    """Check that every question fits the model with its answer, beside the features of its images.

    Args:
        model: a fused model.
        transform: turns questions into sequences.
        questions: questions with answers.
        path: their file, for the message.

    Raises:
        DataError: naming every question that is too long.
    """
    problems = []
    for number, question in enumerate(questions, 1):
        length = sum(map(len, transform.encode(question)))
        room = room_for_text(model, len(question.images) * transform.features_per_image)
        if length > room:
            problems.append(
                f"question {number}: {length} tokens with its answer, and {room} fit into the model's "
                f"max_seq_len beside {len(question.images)} images."
            )
    if problems:
        raise DataError(name_problems(path, problems))


@dataclass(frozen=True)
class ModelSource:
    """A model that is not loaded yet, and its transform.

    Attributes:
        transform: the transform that the model was trained with.
        load: builds and loads the model, on a device in a dtype.
    """

    transform: QuestionTransform
    load: Callable[[str, str], nn.Module]


def read_run(path: str | Path) -> ModelSource:
    """Read the configuration of a finetuning run, and build its transform.

    Args:
        path: the run's ``output_dir``, with ``config.yaml`` and ``fusion/``.

    Raises:
        ConfigError: if the configuration is wrong.
        CheckpointError: on loading, if a checkpoint is wrong or does not fit.
    """
    file = Path(path) / "config.yaml"
    given = read_config(file, "every finetuning run writes one")
    config: dict[str, Any] = OmegaConf.to_container(given, resolve=False)
    sections = ("model", "pretrained", "transform")
    if not all(isinstance(config.get(s), dict) for s in sections):
        raise CheckpointError(f"{file} lacks one of the sections {', '.join(sections)}.")
    where = f"{file}, "
    transform: QuestionTransform = build(
        config["transform"], what=f"{where}transform", kind=QuestionTransform
    )

    def load(device: str, dtype: str) -> nn.Module:
        model = build_model(
            config["model"], config["pretrained"], device=device, dtype=dtype, where=where
        )
        pretrained = config["pretrained"]
        folder = pretrained.get("encoder") or pretrained.get("path")
        check_images(model, transform.image_transform, folder)
        load_trained(model, Path(path) / "fusion")
        return model

    return ModelSource(transform, load)


def read_model(path: str | Path, transform: Mapping[str, Any] | None) -> ModelSource:
    """Build a transform for the directory of a whole model.

    Args:
        path: a directory that ``from_pretrained`` reads.
        transform: the section of a configuration that names and describes the transform.

    Raises:
        ConfigError: if the section is wrong.
        CheckpointError: if there is no such directory; on loading, if the checkpoint is wrong.
    """
    built: QuestionTransform = build(transform, what="transform", kind=QuestionTransform)
    if not Path(path).is_dir():
        raise CheckpointError(f"model: {path} is not a directory.")

    def load(device: str, dtype: str) -> nn.Module:
        place, precision = device_and_dtype(device, dtype)
        model = from_pretrained(path, device=place, dtype=precision, fusion_trainable=False)
        check_images(model, built.image_transform, path)
        return model

    return ModelSource(built, load)


def load_run(path: str | Path, *, device: str, dtype: str) -> tuple[nn.Module, QuestionTransform]:
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
    run = read_run(path)
    return run.load(device, dtype), run.transform
