"""Configuration of the generate recipe: keys, and their ranges."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torchfuse.data.templates import ChatTemplate, text_template
from torchfuse.errors import ConfigError, FusionError
from torchfuse.generation import Sampling as TokenSampling
from torchfuse.options import call_with_options
from torchfuse.quantization import Scheme
from torchfuse.training.device import device_and_dtype

__all__ = ["Config", "Sampling", "check_config", "sampling_of", "template_of"]


@dataclass
class Sampling:
    """How the next token is chosen, and where an answer ends.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens; null: among all.
        top_p: choose among the fewest likeliest tokens with at least this probability; null: among all.
        repetition_penalty: makes tokens that the sequence has already less likely, where above 1.
        max_new_tokens: the longest answer.
        stop_tokens: ids that end an answer; null: those of the template and the tokenizer.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 32
    stop_tokens: list[int] | None = None


@dataclass
class Config:
    """Keys of the recipe.

    Attributes:
        run: the ``output_dir`` of a finetuning run.
        model: directory of a whole model, in place of ``run``.
        transform: with ``model``: a component that returns a ``SampleTransform``, or keys of ``data`` of
            the finetune recipe; null: the directory's own tokenizer and image processor.
        prompts: a YAML file of prompts, or a file of samples; not for a chat.
        format: format of a file of samples, as for ``torchfuse.data.read_samples``.
        image_root: folder where relative paths of images begin; null: that of the file of samples.
        output: file for the answers, a JSON object a line; null: they are printed.
        batch_size: samples that are answered at once.
        chat: whether to chat in the terminal, as with ``--chat``.
        max_tokens: the longest chat, in tokens.
        max_images: the most images in a chat.
        template (text, section or null): a chat template in place of the run's own: a name, a
            ``.jinja`` file, or ``{system, question}``, the texts around a system text and a question,
            which replace ``{text}``.
        sampling: how the next token is chosen, and where an answer ends.
        quantization: how weights are quantized: ``int8_weight_only``, ``int8_dynamic``,
            ``float8_weight_only`` or ``nf4``; null: not at all.
        quantization_parts: what is quantized: ``decoder``, ``encoder``, or ``encoder.<name>``.
        compile: whether prompts and steps run as compiled graphs.
        device: ``cpu``, ``cuda`` or another device of torch.
        dtype: dtype of the weights: ``fp32`` or ``bf16``.
        seed: seed of the tokens that are drawn at a temperature above 0.
    """

    run: str | None = None
    model: str | None = None
    transform: dict[str, Any] | None = None
    prompts: str | None = None
    format: str = "auto"
    image_root: str | None = None
    output: str | None = None
    batch_size: int = 8
    chat: bool = False
    max_tokens: int = 4096
    max_images: int = 4
    template: Any = None
    sampling: Sampling = field(default_factory=Sampling)
    quantization: str | None = None
    quantization_parts: list[str] = field(default_factory=lambda: ["decoder"])
    compile: bool = False
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0


def check_config(config: Config) -> None:
    """Raise one ``ConfigError`` for all problems of the configuration itself."""
    problems = []
    if not config.run and not config.model:
        raise ConfigError("Configuration key 'run' (or 'model'): missing, and must be given.")
    if config.run and config.model:
        problems.append(f"give run={config.run} or model={config.model}, not both")
    if config.run and not config.model and config.transform is not None:
        problems.append("give transform with model only; a run has its own")
    if not config.chat and not config.prompts:
        problems.append("give prompts, a YAML file or a file of samples, or --chat")
    if config.chat and config.output:
        problems.append("output is for prompts, not for a chat")
    problems += [
        f"{name}={value} must be at least {least}"
        for name, value, least in (
            ("batch_size", config.batch_size, 1),
            ("max_tokens", config.max_tokens, 2),
            ("max_images", config.max_images, 0),
            ("sampling.max_new_tokens", config.sampling.max_new_tokens, 1),
        )
        if value < least
    ]
    stops = config.sampling.stop_tokens or []
    if negative := [stop for stop in stops if stop < 0]:
        problems.append(f"sampling.stop_tokens {negative} are no ids")
    problems += [f"sampling.{problem}" for problem in sampling_of(config).problems()]
    try:
        template_of(config)
    except FusionError as error:
        problems.append(str(error).rstrip("."))
    if config.quantization is not None and config.quantization not in get_args(Scheme):
        known = ", ".join(get_args(Scheme))
        problems.append(f"quantization must be null or one of {known}, got {config.quantization!r}")
    parts = config.quantization_parts
    if not parts or not all(part.partition(".")[0] in ("decoder", "encoder") for part in parts):
        problems.append(f"quantization_parts must be decoder, encoder or encoder.<name>, got {parts}")
    try:
        device_and_dtype(config.device, config.dtype)
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    problems += _output_problems(config)
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")


def _output_problems(config: Config) -> list[str]:
    if not config.output:
        return []
    path = Path(config.output)
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        return [f"output={path} must be a file in a directory that can be written to"]
    if config.prompts and path.resolve() == Path(config.prompts).resolve():
        return [f"output={path} is the file of the prompts"]
    return []


def template_of(config: Config) -> ChatTemplate | None:
    """Return the template that replaces the run's own; None if none is configured."""
    given = config.template
    if given is None:
        return None
    if isinstance(given, dict):
        return call_with_options(text_template, what="template", options=given)
    return ChatTemplate.load(given, "")


def sampling_of(config: Config) -> TokenSampling:
    """Return how tokens are chosen."""
    chosen = vars(config.sampling)
    return TokenSampling(
        **{n: v for n, v in chosen.items() if n not in ("max_new_tokens", "stop_tokens")}
    )
