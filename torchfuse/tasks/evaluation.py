"""Evaluation of a trained model: accuracy by kind of sample, and the costs of its training."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from torchfuse.data.samples import Media, Sample
from torchfuse.errors import DataError
from torchfuse.naming import unwrap_model
from torchfuse.params import get_fusion_params
from torchfuse.tasks.prediction import Prediction
from torchfuse.tasks.prompts import prompt_record
from torchfuse.training.record import TrainingRecord

__all__ = [
    "accuracy",
    "accuracy_by_kind",
    "accuracy_table",
    "evaluate",
    "format_costs",
    "prediction_record",
    "sample_kind",
    "swap_images",
    "training_costs",
]


def sample_kind(sample: Sample) -> str:
    """Return the kind of a sample: ``kind`` of its metadata, or ``"question"``."""
    return str(sample.metadata.get("kind", "question"))


def accuracy(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the share of correct answers by kind of sample, and of ``"all"`` samples.

    Raises:
        DataError: if a sample has no answer to compare with.
    """
    unknown = sum(p.sample.answer is None for p in predictions)
    if unknown or not predictions:
        raise DataError(f"{unknown} of {len(predictions)} samples have no answer to compare with.")
    by_kind: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_kind.setdefault(sample_kind(prediction.sample), []).append(prediction)
    groups = {**by_kind, "all": list(predictions)}
    return {kind: sum(p.is_correct for p in group) / len(group) for kind, group in groups.items()}


def accuracy_by_kind(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return ``accuracy`` without ``"all"``, rounded to four digits."""
    return {kind: round(share, 4) for kind, share in accuracy(predictions).items() if kind != "all"}


def accuracy_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Return several results of ``accuracy`` as the columns of a table.

    Args:
        shares: for each column the share of correct answers by kind of sample.

    Examples:
        >>> print(accuracy_table({"before": {"text": 1.0}, "after": {"one_image": 0.987, "text": 1.0}}))
        accuracy             before             after
        text                 100.0%            100.0%
        one_image                               98.7%
    """
    if not shares:
        return "no sample was answered"
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
        >>> from torchfuse.data import Message
        >>> question = Message("user", [Media(Path("a/images/7.png")), " which digit ?"])
        >>> sample = Sample([question, Message("assistant", ["seven"])])
        >>> print(prediction_record(Prediction(sample, "one"), "a/run"))
        ... # doctest: +NORMALIZE_WHITESPACE
        {"kind": "question", "question": "<image> which digit ?", "images": ["../images/7.png"],
         "answer": "seven", "text": "one"}
    """
    sample = prediction.sample
    return json.dumps(
        {
            "kind": sample_kind(sample),
            **prompt_record(sample.prompt, folder),
            "answer": sample.answer,
            "text": prediction.text,
        }
    )


def swap_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Give each sample the images of another one with as many; drop those without such another.

    A model whose answers depend on its images gets most of these wrong. Videos and other media are
    swapped likewise.

    Args:
        samples: samples with images.
        seed: of the order in which images are swapped.

    Raises:
        DataError: if no two samples have the same number of images.
    """
    by_media: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_media.setdefault(_modalities(sample), []).append(index)
    swapped: dict[int, Sample] = {}
    rng = random.Random(seed)
    for modalities, indices in by_media.items():
        if len(indices) < 2 or not modalities:
            continue
        rng.shuffle(indices)
        for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
            swapped[index] = _with_media(samples[index], samples[other].media)
    if not swapped:
        raise DataError("No two samples have the same number of images, so none can be swapped.")
    return [swapped[index] for index in sorted(swapped)]


def _modalities(sample: Sample) -> tuple[str, ...]:
    return tuple(media.modality for media in sample.media)


def _with_media(sample: Sample, media: Sequence[Media]) -> Sample:
    """Return a sample with other media in the places of its own."""
    given = iter(media)
    messages = [
        replace(
            message,
            content=[part if isinstance(part, str) else next(given) for part in message.content],
        )
        for message in sample.messages
    ]
    return replace(sample, messages=messages)


def evaluate(
    predict: Callable[[list[Sample]], list[Prediction]], samples: Sequence[Sample], seed: int = 0
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Evaluate a trained model on samples, and again with their images swapped.

    Args:
        predict: answers samples.
        samples: samples with answers.
        seed: see ``swap_images``.

    Returns:
        The predictions, and accuracy by kind of sample: ``"after"`` training (of ``"all"`` too), and
        with ``"images_exchanged"`` where samples have images to swap. Both empty without samples.
    """
    if not samples:
        return [], {}
    predictions = predict(list(samples))
    shares = {"after": accuracy_by_kind(predictions) | {"all": round(accuracy(predictions)["all"], 4)}}
    numbers = Counter(map(_modalities, samples))
    if with_images := [s for s in samples if s.media and numbers[_modalities(s)] > 1]:
        # Without "all", which would be of fewer samples than the other.
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
