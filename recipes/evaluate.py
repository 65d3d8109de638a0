"""Print the accuracy of a finetuned model on a question file.

Launch, with the output directory of a finetuning run:

    tune run torchfuse/recipes/evaluate.py --config recipes/configs/digits/evaluate.yaml

Model, checkpoints and transform are those of the run's configuration; start the recipe in the directory
in which the run was started if that configuration has relative paths.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from torchfuse.data.questions import check_questions, read_questions
from torchfuse.tasks.evaluation import accuracy
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import load_run
from torchfuse.training.config import recipe


@dataclass
class Config:
    """Keys of the recipe."""

    run: str = MISSING
    questions: str = MISSING
    batch_size: int = 128
    device: str = "cpu"
    dtype: str = "fp32"


@recipe(Config)
def main(config: Config) -> None:
    """Print the accuracy of a finetuned model on a question file."""
    questions = read_questions(config.questions)
    model, transform = load_run(config.run, device=config.device, dtype=config.dtype)
    longest = check_questions(transform, questions, config.questions)
    settings = PromptSettings(transform, max_new_tokens=longest)
    settings.check(model)
    predictions = predict(model, settings, questions, batch_size=config.batch_size)
    shares = accuracy(predictions)
    width = max(map(len, shares))
    for kind, share in shares.items():
        number = sum(kind in ("all", p.question.kind) for p in predictions)
        print(f"{kind:<{width}}  {share:>6.1%}  of {number}")


if __name__ == "__main__":
    main()
