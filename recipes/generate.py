"""Ask a finetuned model questions, and print what it says.

Prompts come from a YAML: a list of ``question``, with ``<image>`` where an image is shown, and
``images``, paths relative to that file:

    - question: "<image> which digit ?"
      images: [images/0012.png]

Launch, with the output directory of a finetuning run:

    tune run torchfuse/recipes/generate.py --config recipes/configs/digits/generate.yaml \
        run=demo/cross_attention prompts=demo/prompt.yaml

The run's own configuration says which model, checkpoints and transform are used; start it where the run
was started if that configuration holds relative paths.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING
from torchtune.utils import batch_to_device, get_device

from torchfuse import generate
from torchfuse.config import recipe
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.images import open_image
from torchfuse.data.questions import Question, question_from
from torchfuse.runs import load_run, read_yaml


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
    model, transform = load_run(config.run, device=config.device, dtype=config.dtype)
    device = get_device(config.device)

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
    prompts = read_yaml(path, "it is a list of prompts")
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


if __name__ == "__main__":
    main()
