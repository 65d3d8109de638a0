"""How many questions a model answers right."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from tqdm import tqdm

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import Question, QuestionTransform
from torchfuse.generation import generate

__all__ = ["Answered", "accuracy", "answer_questions", "exchange_images"]


@dataclass(frozen=True)
class Answered:
    """A question and what the model said."""

    question: Question
    said: str

    @property
    def is_right(self) -> bool:
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
) -> list[Answered]:
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
        answered += [Answered(q, transform.decode(row)) for q, row in zip(asked, new, strict=True)]
    return answered


def accuracy(answered: Sequence[Answered]) -> dict[str, float]:
    """The share of right answers by kind of question, and over ``"all"`` of them.

    Raises:
        ValueError: if a question has no answer to compare with.
    """
    unknown = sum(one.question.answer is None for one in answered)
    if unknown or not answered:
        raise ValueError(f"{unknown} of {len(answered)} questions have no answer to compare with.")
    by_kind: dict[str, list[Answered]] = {}
    for one in answered:
        by_kind.setdefault(one.question.kind, []).append(one)
    groups = {**by_kind, "all": list(answered)}
    return {kind: sum(a.is_right for a in group) / len(group) for kind, group in groups.items()}


def exchange_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """Show each question the images of another one with as many; leave out what has no such other.

    A model that looks at its images gets most of these wrong: the check that features reach the answer.

    Args:
        questions: questions with images.
        seed: of the order in which images are handed on.

    Raises:
        ValueError: if no question has an other with as many images.
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
        raise ValueError("No two questions have the same number of images, so none can be exchanged.")
    return [exchanged[index] for index in sorted(exchanged)]
