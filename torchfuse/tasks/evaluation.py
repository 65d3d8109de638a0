"""Evaluation of a trained model: accuracy by kind of question, and the costs of its training."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from torchfuse.data.questions import Question
from torchfuse.errors import DataError
from torchfuse.naming import unwrap_model
from torchfuse.params import get_fusion_params
from torchfuse.tasks.prediction import Prediction
from torchfuse.training.record import TrainingRecord

__all__ = [
    "accuracy",
    "accuracy_by_kind",
    "accuracy_table",
    "evaluate",
    "format_costs",
    "prediction_record",
    "swap_images",
    "training_costs",
]


def accuracy(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the share of correct answers by kind of question, and of ``"all"`` questions.

    Raises:
        DataError: if a question has no answer to compare with.
    """
    unknown = sum(p.question.answer is None for p in predictions)
    if unknown or not predictions:
        raise DataError(f"{unknown} of {len(predictions)} questions have no answer to compare with.")
    by_kind: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_kind.setdefault(prediction.question.kind, []).append(prediction)
    groups = {**by_kind, "all": list(predictions)}
    return {kind: sum(p.is_correct for p in group) / len(group) for kind, group in groups.items()}


def accuracy_by_kind(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return ``accuracy`` without ``"all"``, rounded to four digits."""
    return {kind: round(share, 4) for kind, share in accuracy(predictions).items() if kind != "all"}


def accuracy_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Return several results of ``accuracy`` as the columns of a table.

    Args:
        shares: for each column the share of correct answers by kind of question.

    Examples:
        >>> print(accuracy_table({"before": {"text": 1.0}, "after": {"one_image": 0.987, "text": 1.0}}))
        accuracy             before             after
        text                 100.0%            100.0%
        one_image                               98.7%
    """
    if not shares:
        return "no question was answered"
    kinds = list(dict.fromkeys(kind for by_kind in shares.values() for kind in by_kind))
    width = max(map(len, ["accuracy", *kinds]))
    lines = [f"{'accuracy':<{width}}" + "".join(f"  {name:>16}" for name in shares)]
    for kind in kinds:
        cells = [f"{by_kind[kind]:.1%}" if kind in by_kind else "" for by_kind in shares.values()]
        lines.append(f"{kind:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join(lines)


def prediction_record(prediction: Prediction, folder: str | Path) -> str:
    """Return a prediction as a line of JSON, paths of images relative to the folder of the file.

    Examples:
        >>> question = Question("<image> which digit ?", (Path("a/images/7.png"),), "seven")
        >>> line = prediction_record(Prediction(question, "one"), "a/run")
        >>> print(line)  # doctest: +NORMALIZE_WHITESPACE
        {"kind": "question", "question": "<image> which digit ?", "images": ["../images/7.png"],
         "answer": "seven", "text": "one"}
    """
    question = prediction.question
    return json.dumps(
        {
            "kind": question.kind,
            "question": question.question,
            "images": [os.path.relpath(image, folder) for image in question.images],
            "answer": question.answer,
            "text": prediction.text,
        }
    )


def swap_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Give each question the images of another one with as many; drop those without such another.

    A model whose answers depend on its images gets most of these wrong.

    Args:
        questions: questions with images.
        seed: of the order in which images are swapped.

    Raises:
        DataError: if no two questions have the same number of images.
    """
    by_number: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        by_number.setdefault(len(question.images), []).append(index)
    swapped: dict[int, Question] = {}
    rng = random.Random(seed)
    for number, indices in by_number.items():
        if len(indices) < 2 or not number:
            continue
        rng.shuffle(indices)
        for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
            swapped[index] = replace(questions[index], images=questions[other].images)
    if not swapped:
        raise DataError("No two questions have the same number of images, so none can be swapped.")
    return [swapped[index] for index in sorted(swapped)]


def evaluate(
    predict: Callable[[list[Question]], list[Prediction]], questions: Sequence[Question], seed: int = 0
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Evaluate a trained model on questions, and again with their images swapped.

    Args:
        predict: answers questions.
        questions: questions with answers.
        seed: see ``swap_images``.

    Returns:
        The predictions, and accuracy by kind of question: ``"after"`` training (of ``"all"`` too), and
        with ``"images_exchanged"`` where questions have images to swap. Both empty without questions.
    """
    if not questions:
        return [], {}
    predictions = predict(list(questions))
    shares = {"after": accuracy_by_kind(predictions) | {"all": round(accuracy(predictions)["all"], 4)}}
    numbers = Counter(len(question.images) for question in questions)
    if with_images := [q for q in questions if q.images and numbers[len(q.images)] > 1]:
        # Without "all", which would be of fewer questions than the other.
        shares["images_exchanged"] = accuracy_by_kind(predict(swap_images(with_images, seed)))
    return predictions, shares


def training_costs(model: nn.Module, record: TrainingRecord) -> dict[str, Any]:
    """Return the cost of training a model, and the load of its experts in their last run.

    Args:
        model: the trained model.
        record: of its training.

    Returns:
        ``new_parameters``, ``steps``, ``training_seconds``, ``tokens`` (by modality),
        ``tokens_per_second``, ``accuracy_at_step`` and the ``statistics`` of the architecture, such as
        ``expert_load`` for one with experts of modalities; all of it JSON.
    """
    costs: dict[str, Any] = {
        "new_parameters": sum(p.numel() for p in get_fusion_params(model).values()),
        "steps": len(record.losses),
        "training_seconds": round(record.seconds, 1),
        "tokens": dict(record.tokens),
        "tokens_per_second": round(sum(record.tokens.values()) / record.seconds),
        "accuracy_at_step": [[step, round(share, 4)] for step, share in record.accuracies],
    }
    strategy = getattr(unwrap_model(model), "strategy", None)
    return costs if strategy is None else costs | strategy.statistics(model)


def format_costs(costs: Mapping[str, Any]) -> str:
    """Return the result of ``training_costs`` as text.

    Examples:
        >>> costs = {"new_parameters": 1234, "steps": 5, "training_seconds": 2.5}
        >>> costs |= {"tokens": {"text": 4100, "image": 900}, "tokens_per_second": 2000}
        >>> print(format_costs(costs | {"expert_load": {"layers.0": {"image": [0.25, 0.125]}}}))
        trained 1,234 new parameters for 2.5 s, on 4,100 tokens of text and 900 of image: 2,000 a second
        layers.0: its experts of image took 25%, 12% of the tokens when they last ran
    """
    text, *others = (f"{count:,} tokens of {name}" for name, count in costs["tokens"].items())
    tokens = " and ".join([text, *(other.replace(" tokens", "") for other in others)])
    lines = [
        f"trained {costs['new_parameters']:,} new parameters for {costs['training_seconds']:,} s, on "
        f"{tokens}: {costs['tokens_per_second']:,} a second"
    ]
    for layer, load in costs.get("expert_load", {}).items():
        for name, shares in load.items():
            taken = ", ".join(f"{share:.0%}" for share in shares)
            lines.append(f"{layer}: its experts of {name} took {taken} of the tokens when they last ran")
    return "\n".join(lines)
