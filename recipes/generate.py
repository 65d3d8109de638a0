"""Ask a finetuned model questions, and print what it says.

Prompts come from a YAML: a list of ``question``, with ``<image>`` where an image is shown, and
``images``, paths relative to that file::

    - question: "<image> which digit ?"
      images: [images/0012.png]

Launch, with the output directory of a finetuning run::

    tune run torchfuse/recipes/generate.py --config recipes/configs/digits/generate.yaml \
        run=demo/cross_attention prompts=demo/prompt.yaml

The run's own configuration says which model, checkpoints and transform are used; start it where the run
was started if that configuration holds relative paths.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import MISSING
from torch import nn
from torchtune import training
from torchtune.utils import batch_to_device, get_device

from torchfuse import generate, load_fusion, load_pretrained
from torchfuse.config import build, recipe
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.images import open_image
from torchfuse.data.questions import Question, QuestionTransform, question_from


@dataclass
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 32


@dataclass
class Config:
    """Everything that the recipe takes."""

    run: str = MISSING
    prompts: str = MISSING
    sampling: Sampling = field(default_factory=Sampling)
    device: str = "cpu"
    dtype: str = "fp32"
    seed: int = 0


@recipe(Config)
def main(config: Config) -> None:
    """Ask a finetuned model questions, and print what it says."""
    questions = _read_prompts(Path(config.prompts))
    run = _read_yaml(Path(config.run) / "config.yaml", "It is written by the finetune recipe.")
    transform: QuestionTransform = build(run["transform"], what="transform")
    device = get_device(config.device)
    with training.set_default_dtype(training.get_dtype(config.dtype, device)), device:
        model: nn.Module = build(run["model"], what="model")
    load_pretrained(model, **run["pretrained"])
    load_fusion(model, Path(config.run) / "fusion")

    samples = [transform(question, with_answer=False) for question in questions]
    batch = padded_collate_images(samples, transform.pad_id, pad_left=True)
    batch_to_device(batch, device)
    prompts = batch.pop("tokens")
    started = time.perf_counter()
    tokens = generate(
        model,
        prompts,
        **batch,
        **vars(config.sampling),
        stop_tokens=transform.stop_tokens,
        pad_id=transform.pad_id,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    seconds = time.perf_counter() - started
    new = tokens[:, prompts.shape[1] :]
    print()
    for question, row in zip(questions, new.tolist(), strict=True):
        names = ", ".join(image.name for image in question.images)
        print(f"{question.question}  [{names}]" if names else question.question)
        print(f"    {transform.decode(row)}")
    print(f"\n{new.numel()} tokens for {len(questions)} prompts in {seconds:.2f} s")


def _read_prompts(path: Path) -> list[Question]:
    prompts = _read_yaml(path, "It is a list of questions.")
    if not isinstance(prompts, list) or not all(isinstance(p, dict) for p in prompts) or not prompts:
        raise ValueError(f"{path} must hold a list of prompts, each with a question.")
    questions = []
    for number, prompt in enumerate(prompts, 1):
        try:
            questions.append(question_from(prompt, path.parent))
            for image in questions[-1].images:
                open_image(image)
        except ValueError as error:
            raise ValueError(f"{path}, prompt {number}: {error}") from error
    return questions


def _read_yaml(path: Path, hint: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}). {hint}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error


if __name__ == "__main__":
    main()
