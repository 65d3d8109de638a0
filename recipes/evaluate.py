"""Score a finetuned model's answers to the samples of a file, by kind, source or another field.

Launch, with the output directory of a finetuning run:

    tune run torchfuse/recipes/evaluate.py --config recipes/configs/digits/evaluate.yaml

The last answer of each conversation is compared. Model, checkpoints and transform are those of the run's
configuration; start the recipe in the directory in which the run was started if that configuration has
relative paths.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from torchfuse.data import Sample, read_mixture
from torchfuse.data.readers.read_all import read_all
from torchfuse.errors import ConfigError, DataError, name_problems
from torchfuse.io.atomic import write_files
from torchfuse.tasks.evaluation import (
    LOSS,
    Scores,
    answer_losses,
    check_matplotlib,
    draw_predictions,
    group_problems,
    group_scores,
    metric_problems,
    prediction_record,
    score_predictions,
    score_table,
)
from torchfuse.tasks.prediction import Prediction, predict
from torchfuse.tasks.prompt_lengths import longest_answer
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import read_run
from torchfuse.training.config import check_output_dir, recipe


@dataclass
class Config:
    """Keys of the recipe.

    Attributes:
        run: the ``output_dir`` of a finetuning run.
        questions (text or list of sections): a file of samples, as for ``torchfuse.data.read_samples``,
            or a list of ``{path, format, image_root}``.
        format: format of the file ``questions``.
        image_root: folder where relative paths of images begin; null: that of the file ``questions``.
        metrics: columns of the table: ``exact_match``, ``contained``, ``vqa_accuracy``, ``anls``, and
            ``loss``, the loss a token on the reference answers; null: ``exact_match``, without titles.
        by (text or list of text): the rows of the table: ``kind``, ``source`` (the field, or else the
            file), ``modality``, or any other field of the samples; several make a table each.
        output_dir: folder for ``predictions.jsonl``, ``results.json`` and ``predictions.png``; null:
            nothing is written.
        num_shown: how many right and how many wrong answers the picture has at most; 0: no picture.
        max_new_tokens: the longest answer; null: that of the samples.
        batch_size: samples that are answered at once.
        device: ``cpu``, ``cuda`` or another device of torch.
        dtype: dtype of the weights: ``fp32`` or ``bf16``.
    """

    run: str = MISSING
    questions: Any = MISSING
    format: str = "auto"
    image_root: str | None = None
    metrics: list[str] | None = None
    by: Any = "kind"
    output_dir: str | None = None
    num_shown: int = 8
    max_new_tokens: int | None = None
    batch_size: int = 128
    device: str = "cpu"
    dtype: str = "fp32"


@recipe(Config)
def main(config: Config) -> None:
    """Score a finetuned model's answers to the samples of a file."""
    check_config(config)
    load = read_run(config.run)
    samples = _read_samples(config)
    model, transform = load(config.device, config.dtype)
    longest = longest_answer(transform, samples, _name(config))
    settings = PromptSettings(transform, max_new_tokens=config.max_new_tokens or longest)
    settings.check(model)
    predictions = predict(model, settings, samples, batch_size=config.batch_size)
    losses = None
    if LOSS in _metrics(config):
        losses = answer_losses(model, transform, samples, batch_size=config.batch_size)
    scores = score_predictions(predictions, _metrics(config), losses)
    means = {by: group_scores(samples, scores, by) for by in _groups(config)}
    tables = [score_table(rows, by=by if config.metrics else None) for by, rows in means.items()]
    print("\n\n".join(tables))
    if config.output_dir is not None:
        _write(Path(config.output_dir), config, predictions, scores, means)


def check_config(config: Config) -> None:
    """Check what can be checked before a file is read.

    Raises:
        ConfigError: naming every key that is wrong.
    """
    problems = metric_problems(_metrics(config))
    groups = _groups(config)
    if not groups or not all(isinstance(by, str) and by for by in groups):
        problems.append(f"by must be a field of the samples or a list of them, got {config.by!r}")
    if not isinstance(config.questions, str) and (config.format != "auto" or config.image_root):
        problems.append("format and image_root are of one file; give them with the paths in questions")
    for name, least in {"num_shown": 0, "max_new_tokens": 1, "batch_size": 1}.items():
        value = getattr(config, name)
        if value is not None and value < least:
            problems.append(f"{name} must be at least {least}, got {value}")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")
    if config.output_dir is not None:
        check_output_dir(config.output_dir)
        if config.num_shown:
            check_matplotlib()


def _metrics(config: Config) -> list[str]:
    return ["exact_match"] if config.metrics is None else config.metrics


def _groups(config: Config) -> list[str]:
    return config.by if isinstance(config.by, list) else [config.by]


def _name(config: Config) -> str:
    """Return the name of the samples' file, for messages."""
    return config.questions if isinstance(config.questions, str) else "questions"


def _read_samples(config: Config) -> list[Sample]:
    """Read all samples, and check that each has an answer and they have the fields of the groups."""
    given, name = config.questions, _name(config)
    if isinstance(given, str):
        given = {"path": given, "format": config.format, "image_root": config.image_root}
    samples = read_all(read_mixture(given, what="questions").samples, name)
    if unanswered := [sample.origin for sample in samples if sample.answer is None]:
        problems = [f"{origin.removeprefix(f'{name}, ')} has no answer." for origin in unanswered]
        raise DataError(name_problems(name, problems))
    if problems := [problem for by in _groups(config) for problem in group_problems(samples, by)]:
        raise ConfigError(f"{'; '.join(problems)}.")
    return samples


def _write(
    folder: Path,
    config: Config,
    predictions: Sequence[Prediction],
    scores: Scores,
    means: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    """Write predictions, results and a picture, all of them or nothing."""
    results = {"run": config.run, "questions": config.questions, "results": means}
    lines = []
    for index, prediction in enumerate(predictions):
        own = {name: column[index].value for name, column in scores.items()}
        lines.append(prediction_record(prediction, folder, own) + "\n")
    # A loss does not separate right answers from wrong ones.
    metric = next((name for name in scores if name != LOSS), "exact_match")
    shown = scores.get(metric) or score_predictions(predictions, [metric])[metric]
    files = {
        "predictions.jsonl": lambda path: path.write_text("".join(lines), encoding="utf-8"),
        "results.json": lambda path: path.write_text(json.dumps(results, indent=2) + "\n"),
        "predictions.png": lambda path: draw_predictions(
            path,
            predictions,
            [score.value for score in shown],
            num_each=config.num_shown,
            title=f"Answers of {config.run}, by {metric}",
        ),
    }
    if not config.num_shown:
        del files["predictions.png"]
    write_files(folder, files)
    print(f"\nwrote {', '.join(str(folder / name) for name in files)}")


if __name__ == "__main__":
    main()
