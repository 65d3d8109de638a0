"""Answers to many questions, in batches of rows with any number of images.

Questions that are about as long, with as many images, go together, which pads least; each draws from a
generator of its own, so that its answer does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import Question
from torchfuse.tasks.prompt_settings import PromptSettings, encode_images, slots_for
from torchfuse.tasks.report import Report, TimedSession

__all__ = ["answer_in_batches"]


@torch.no_grad()
def answer_in_batches(
    model: nn.Module,
    asking: PromptSettings,
    questions: Sequence[Question],
    *,
    batch_size: int,
    report: Report | None = None,
    desc: str = "answer",
) -> list[str]:
    """Ask a model questions that have nothing to do with each other.

    Args:
        model: a fused model without caches, in evaluation mode.
        asking: how questions are put and answers made. Compiled, every batch is padded to the shape of
            the largest, so that few graphs serve all.
        questions: questions with none, one or several images, mixed.
        batch_size: questions in a batch.
        report: notes what everything took.
        desc: label of the progress bar.

    Returns:
        The answers, in the order of the questions.

    Raises:
        DataError: if a question and its answer do not fit the model; nothing has been answered then.
    """
    if not questions:
        return []
    transform = asking.transform
    filled = [replace(q, question=asking.template.fill(q.question)) for q in questions]
    encoded = [transform.encode(question, with_answer=False)[0] for question in filled]
    most_images = max(len(question.images) for question in filled)
    slots = slots_for(model, asking, [[turn] for turn in encoded], most_images, path="questions")
    order = sorted(range(len(filled)), key=lambda i: (len(filled[i].images), len(encoded[i])))
    answers = [""] * len(filled)
    report, rows = report or Report(), min(batch_size, len(filled))
    session = TimedSession(
        model,
        report=report,
        batch_size=rows,
        max_tokens=slots,
        max_features=most_images * transform.features_per_image,
        pad_id=transform.pad_id,
        compile=asking.compile,
    )
    with session, tqdm(total=len(filled), desc=desc, disable=None) as bar:
        for start in range(0, len(order), rows):
            indices = order[start : start + rows]
            full = indices + indices[-1:] * (rows - len(indices))  # the caches have that many rows
            batch = padded_collate_images(
                [transform(filled[i], with_answer=False) for i in full], transform.pad_id, pad_left=True
            )
            number = sum(len(filled[i].images) for i in indices)
            features = _encode(model, batch, report, number)
            if asking.compile:
                most = most_images * transform.features_per_image
                features = _pad(batch, features, max(map(len, encoded)), most, transform.pad_id)
            for i, answer in zip(indices, _answer(session, asking, batch, features, full), strict=False):
                answers[i] = asking.text(answer)
            bar.update(len(indices))
    return answers


def _encode(model: nn.Module, batch: dict[str, Any], report: Report, number: int) -> Tensor | None:
    given = batch.pop("encoder_input", None)
    if given is None:
        return None
    device = next(model.parameters()).device
    return encode_images(model, given["images"].to(device), report, number)


def _pad(
    batch: dict[str, Any], features: Tensor | None, length: int, num_features: int, pad_id: int
) -> Tensor | None:
    """Pad a batch's tokens to one length, and its features, if it has any, to one number."""
    left = length - batch["tokens"].shape[1]
    batch["tokens"] = F.pad(batch["tokens"], (left, 0), value=pad_id)
    if features is None:
        return None
    more = num_features - features.shape[1]
    batch["encoder_mask"] = F.pad(batch["encoder_mask"], (0, more, left, 0))
    return F.pad(features, (0, 0, 0, more))


def _answer(
    session: TimedSession,
    asking: PromptSettings,
    batch: dict[str, Any],
    features: Tensor | None,
    indices: Sequence[int],
) -> list[list[int]]:
    """The answers of all rows, each up to its end; rows that repeat one count once."""
    device = next(session.model.parameters()).device
    generators = [asking.generator(i, device) for i in indices]
    mask = batch.get("encoder_mask")
    session.reset()
    said, _ = session.answer(
        batch["tokens"].to(device),
        max_new_tokens=asking.max_new_tokens,
        encoder_embeds=features,
        encoder_mask=None if mask is None else mask.to(device),
        sampling=asking.sampling,
        stop_tokens=asking.stops,
        generator=[generator for generator in generators if generator is not None] or None,
    )
    answers = [asking.until_stop(row) for row in said.tolist()]
    session.count(answers[: len(set(indices))])
    return answers
