"""What became of a model: how many questions it answers right, and what training it took."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import Question, QuestionTransform
from torchfuse.errors import DataError
from torchfuse.generation import generate
from torchfuse.modules.experts.modality_experts import MoMaLayer, expert_load
from torchfuse.params import get_fusion_params
from torchfuse.training.record import TrainingRecord

__all__ = [
    "Prediction",
    "accuracy",
    "accuracy_by_kind",
    "accuracy_table",
    "answer_questions",
    "answer_record",
    "costs_in_words",
    "evaluate",
    "swap_images",
    "training_costs",
]


@dataclass(frozen=True)
class Prediction:
    """A question and what the model said."""

    question: Question
    said: str

    @property
    def is_correct(self) -> bool:
        """Whether the model said the answer, word for word."""
        return self.question.answer is not None and self.said.split() == self.question.answer.split()


def answer_questions(
    model: nn.Module,
    transform: QuestionTransform,
    questions: Sequence[Question],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    desc: str = "answer",
) -> list[Prediction]:
    """Ask a model questions and take its likeliest answers.

    Args:
        model: a fused model, or a decoder if no question has an image.
        transform: the transform that the model was trained with.
        questions: questions of any kind, mixed.
        batch_size: questions in a batch.
        max_new_tokens: longest answer, the end of the sequence included.
        desc: label of the progress bar.

    Returns:
        What the model said to each question, in their order.
    """
    device = next(model.parameters()).device
    answered = []
    batches = range(0, len(questions), batch_size)
    for start in tqdm(batches, desc=desc, disable=None, leave=False):
        asked = questions[start : start + batch_size]
        samples = [transform(question, with_answer=False) for question in asked]
        batch = padded_collate_images(samples, padding_idx=transform.pad_id, pad_left=True)
        images = batch.get("encoder_input")
        mask = batch.get("encoder_mask")
        tokens = generate(
            model,
            batch["tokens"].to(device),
            encoder_input=None if images is None else {k: v.to(device) for k, v in images.items()},
            encoder_mask=None if mask is None else mask.to(device),
            max_new_tokens=max_new_tokens,
            temperature=0,
            stop_tokens=transform.stop_tokens,
            pad_id=transform.pad_id,
        )
        new = tokens[:, batch["tokens"].shape[1] :].tolist()
        answered += [Prediction(q, transform.decode(row)) for q, row in zip(asked, new, strict=True)]
    return answered


def accuracy(answered: Sequence[Prediction]) -> dict[str, float]:
    """The share of right answers by kind of question, and over ``"all"`` of them.

    Raises:
        DataError: if a question has no answer to compare with.
    """
    unknown = sum(one.question.answer is None for one in answered)
    if unknown or not answered:
        raise DataError(f"{unknown} of {len(answered)} questions have no answer to compare with.")
    by_kind: dict[str, list[Prediction]] = {}
    for one in answered:
        by_kind.setdefault(one.question.kind, []).append(one)
    groups = {**by_kind, "all": list(answered)}
    return {kind: sum(a.is_correct for a in group) / len(group) for kind, group in groups.items()}


def accuracy_by_kind(answered: Sequence[Prediction]) -> dict[str, float]:
    """As ``accuracy``, by kind of question alone, and to four digits."""
    return {kind: round(share, 4) for kind, share in accuracy(answered).items() if kind != "all"}


def accuracy_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """What ``accuracy`` said on several occasions, one beside the other.

    Args:
        shares: for each occasion the share of right answers by kind of question.

    Examples:
        >>> print(accuracy_table({"before": {"text": 1.0}, "after": {"one_image": 0.987, "text": 1.0}}))
        accuracy             before             after
        text                 100.0%            100.0%
        one_image                               98.7%
    """
    if not shares:
        return "no question was asked"
    kinds = list(dict.fromkeys(kind for by_kind in shares.values() for kind in by_kind))
    width = max(map(len, ["accuracy", *kinds]))
    lines = [f"{'accuracy':<{width}}" + "".join(f"  {name:>16}" for name in shares)]
    for kind in kinds:
        cells = [f"{by_kind[kind]:.1%}" if kind in by_kind else "" for by_kind in shares.values()]
        lines.append(f"{kind:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join(lines)


def answer_record(answered: Prediction, folder: str | Path) -> str:
    """A question and its answer as a line of JSON, images relative to the folder it shall stand in.

    Examples:
        >>> asked = Question("<image> which digit ?", (Path("a/images/7.png"),), "seven")
        >>> print(answer_record(Prediction(asked, "one"), "a/run"))  # doctest: +NORMALIZE_WHITESPACE
        {"kind": "question", "question": "<image> which digit ?", "images": ["../images/7.png"],
         "answer": "seven", "said": "one"}
    """
    question = answered.question
    return json.dumps(
        {
            "kind": question.kind,
            "question": question.question,
            "images": [os.path.relpath(image, folder) for image in question.images],
            "answer": question.answer,
            "said": answered.said,
        }
    )


def swap_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Show each question the images of another one with as many; leave out what has no such other.

    A model that looks at its images gets most of these wrong: the check that features reach the answer.

    Args:
        questions: questions with images.
        seed: of the order in which images are handed on.

    Raises:
        DataError: if no question has an other with as many images.
    """
    by_number: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        by_number.setdefault(len(question.images), []).append(index)
    exchanged: dict[int, Question] = {}
    rng = random.Random(seed)
    for number, indices in by_number.items():
        if len(indices) < 2 or not number:
            continue
        rng.shuffle(indices)
        for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
            exchanged[index] = replace(questions[index], images=questions[other].images)
    if not exchanged:
        raise DataError("No two questions have the same number of images, so none can be exchanged.")
    return [exchanged[index] for index in sorted(exchanged)]


def evaluate(
    ask: Callable[[list[Question]], list[Prediction]], questions: Sequence[Question], seed: int = 0
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Ask a trained model questions, and once more with the images of others.

    Args:
        ask: asks the model.
        questions: questions with answers.
        seed: see ``swap_images``.

    Returns:
        What the model said, and accuracy by kind of question ``"after"`` training (over ``"all"``, too)
        and with ``"images_exchanged"``; nothing where there is nothing to ask.
    """
    if not questions:
        return [], {}
    answered = ask(list(questions))
    shares = {"after": accuracy_by_kind(answered) | {"all": round(accuracy(answered)["all"], 4)}}
    numbers = Counter(len(question.images) for question in questions)
    if seeing := [q for q in questions if q.images and numbers[len(q.images)] > 1]:
        # Without "all", which would be of other questions than the other.
        shares["images_exchanged"] = accuracy_by_kind(ask(swap_images(seeing, seed)))
    return answered, shares


def training_costs(model: nn.Module, record: TrainingRecord) -> dict[str, Any]:
    """What fusion added to a model, what training took, and what experts took when they last ran.

    Args:
        model: the trained model.
        record: how it was trained.

    Returns:
        ``new_parameters``, ``steps``, ``training_seconds``, ``tokens`` (by modality),
        ``tokens_per_second``, ``accuracy_at_step`` and, for a model with experts of modalities,
        ``expert_load``; all of it fit for JSON.
    """
    costs: dict[str, Any] = {
        "new_parameters": sum(p.numel() for p in get_fusion_params(model).values()),
        "steps": len(record.losses),
        "training_seconds": round(record.seconds, 1),
        "tokens": dict(record.tokens),
        "tokens_per_second": round(sum(record.tokens.values()) / record.seconds),
        "accuracy_at_step": [[step, round(share, 4)] for step, share in record.accuracies],
    }
    if any(isinstance(module, MoMaLayer) for module in model.modules()):
        costs["expert_load"] = {
            layer: {name: [round(float(s), 3) for s in shares] for name, shares in load.items()}
            for layer, load in expert_load(model).items()
        }
    return costs


def costs_in_words(costs: Mapping[str, Any]) -> str:
    """What ``training_costs`` returned, for a reader.

    Examples:
        >>> costs = {"new_parameters": 1234, "steps": 5, "training_seconds": 2.5}
        >>> costs |= {"tokens": {"text": 4100, "image": 900}, "tokens_per_second": 2000}
        >>> print(costs_in_words(costs | {"expert_load": {"layers.0": {"image": [0.25, 0.125]}}}))
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
