"""Print the accuracy of a finetuned model on a file of samples, by kind.

Launch, with the output directory of a finetuning run:

    tune run torchfuse/recipes/evaluate.py --config recipes/configs/digits/evaluate.yaml

``questions`` is a file in any format that ``torchfuse.data.read_samples`` reads; the last answer of each
conversation is compared. Model, checkpoints and transform are those of the run's configuration; start
the recipe in the directory in which the run was started if that configuration has relative paths.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from torchfuse.tasks.evaluation import accuracy, sample_kind
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_lengths import longest_answer
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.prompts import load_samples
from torchfuse.tasks.runs import read_run
from torchfuse.training.config import recipe


@dataclass
class Config:
    """Keys of the recipe; ``format`` and ``image_root`` are of the file ``questions``."""

    run: str = MISSING
    questions: str = MISSING
    format: str = "auto"
    image_root: str | None = None
    batch_size: int = 128
    device: str = "cpu"
    dtype: str = "fp32"


@recipe(Config)
def main(config: Config) -> None:
    """Print the accuracy of a finetuned model on a file of samples, by kind."""
    load = read_run(config.run)
    samples = load_samples(config.questions, format=config.format, image_root=config.image_root)
    model, transform = load(config.device, config.dtype)
    longest = longest_answer(transform, samples, config.questions)
    settings = PromptSettings(transform, max_new_tokens=longest)
    settings.check(model)
    predictions = predict(model, settings, samples, batch_size=config.batch_size)
    shares = accuracy(predictions)
    width = max(map(len, shares))
    for kind, share in shares.items():
        number = sum(kind in ("all", sample_kind(p.sample)) for p in predictions)
        print(f"{kind:<{width}}  {share:>6.1%}  of {number}")


if __name__ == "__main__":
    main()
