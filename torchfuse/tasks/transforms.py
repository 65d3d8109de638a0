"""The transform of a finetuning run, from the sections of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.load import from_pretrained
from torchfuse.components import build, resolve
from torchfuse.data.images import ImageTransform, find_processor
from torchfuse.data.templates import ChatTemplate
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError
from torchfuse.naming import find_model, unwrap

__all__ = ["find_folder", "is_from_pretrained", "make_transform", "read_transform"]

# Keys of ``data`` that are arguments of ``SampleTransform``.
_OPTIONS: Final = ("image_token", "features_per_image", "scope", "cache_images", "media_transforms")


def make_transform(model: nn.Module, config: Mapping[str, Any], *, where: str = "") -> SampleTransform:
    """Make the transform of a finetuning run.

    Args:
        model: the run's model.
        config: see ``read_transform``.
        where: prefix of the sections' names in messages.

    Raises:
        ConfigError: if a section is wrong or does not fit the model.
        CheckpointError: if a directory lacks its file.
    """
    return read_transform(config, where=where)(model)


def read_transform(
    config: Mapping[str, Any], *, where: str = ""
) -> Callable[[nn.Module], SampleTransform]:
    """Check what a configuration says about the transform, before there is a model.

    Args:
        config: sections of the configuration. ``transform`` names a component, which is the transform.
            Without it, the transform is made by ``SampleTransform.for_model`` from keys of ``data``:
            ``tokenizer`` and ``image_transform`` (directories, by default those of the decoder and the
            encoder in ``pretrained``, or in ``model`` where it is ``torchfuse.from_pretrained``),
            ``template``, ``max_seq_len``, and what the model does not determine: ``image_token``,
            ``features_per_image``, ``scope``, ``cache_images`` and ``media_transforms``.
        where: prefix of the sections' names in messages.

    Returns:
        A function that makes the transform that fits a model.

    Raises:
        ConfigError: if a section is wrong.
        CheckpointError: if a directory lacks its file.
    """
    if config.get("transform"):
        built: SampleTransform = build(
            config["transform"], what=f"{where}transform", kind=SampleTransform
        )
        return lambda model: _within(built, model)
    data = config.get("data") or {}
    tokenizer = data.get("tokenizer") or find_folder(config, "decoder")
    if tokenizer is None:
        raise ConfigError(
            f"Configuration key '{where}data.tokenizer': missing, and must be given where neither "
            "pretrained nor model names the decoder's directory."
        )
    length = data.get("max_seq_len")
    if length is not None and (type(length) is not int or length < 1):
        raise ConfigError(f"{where}data.max_seq_len={length!r}: expected an integer above 0.")
    images = _image_transform(config, where)
    template = ChatTemplate.load(data.get("template"), tokenizer)
    options = {name: data[name] for name in _OPTIONS if data.get(name) is not None}
    return lambda model: SampleTransform.for_model(model, tokenizer, images, template, length, **options)


def _within(transform: SampleTransform, model: nn.Module) -> SampleTransform:
    """Limit the sequences of a transform to what fits the model, if that has a limit."""
    most = getattr(unwrap(find_model(model)), "max_seq_len", None)
    if isinstance(most, int):
        transform.max_seq_len = min(transform.max_seq_len or most, most)
    return transform


def is_from_pretrained(model: Mapping[str, Any], where: str = "") -> bool:
    """Whether the component of a section ``model`` is ``torchfuse.from_pretrained``."""
    return resolve(model.get("_component_"), what=f"{where}model") is from_pretrained


def find_folder(config: Mapping[str, Any], part: str) -> Any:
    """Return the directory of a pretrained part by a configuration; None if none is named.

    Args:
        config: sections of the configuration: ``pretrained``, or ``model``.
        part: ``"decoder"`` or ``"encoder"``; several encoders have their directories by name.
    """
    model = config.get("model") or {}
    sections = [config.get("pretrained") or {}]
    if model.get("_component_") and is_from_pretrained(model):
        sections.append(model)
    named = (section.get(key) for section in sections for key in (part, "path"))
    return next((folder for folder in named if folder), None)


def _image_transform(config: Mapping[str, Any], where: str) -> ImageTransform | None:
    data, what = config.get("data") or {}, f"{where}data.image_transform"
    given = data.get("image_transform")
    if isinstance(given, Mapping):
        built: ImageTransform = build(given, what=what, kind=ImageTransform)
        return built
    folder = named = given or find_folder(config, "encoder")
    if isinstance(folder, Mapping):
        folder = next(iter(folder.values())) if len(folder) == 1 else folder.get("image")
    if not given and data.get("media_transforms") and not (folder and find_processor(folder)):
        return None  # an encoder of another modality
    if folder is not None and not isinstance(folder, str | Mapping):
        section = "data: image_transform" if given else "pretrained: encoder"
        raise ConfigError(
            f"{where}{section} must be a string, a path, a mapping of one or null, got {named!r}."
        )
    if not isinstance(folder, str):
        raise ConfigError(
            f"Configuration key '{what}': missing, and must be given where neither pretrained nor "
            "model names the directory of the encoder of images (of several, the one named image)."
        )
    return ImageTransform.from_directory(folder)
