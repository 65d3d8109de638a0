"""The batches of each optimizer step, and the number of their tokens by modality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import QuestionDataset, QuestionTransform
from torchfuse.errors import DataError

__all__ = ["count_tokens", "optimizer_steps"]

Step = list[dict[str, Any]]


def optimizer_steps(
    questions: QuestionDataset,
    *,
    batch_size: int,
    batches_per_step: int = 1,
    epochs: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
    world_size: int = 1,
    rank: int = 0,
    start: int = 0,
) -> tuple[int, Iterator[Step]]:
    """Shuffle questions in every epoch, and batch them.

    Args:
        questions: the questions.
        batch_size: questions in a batch.
        batches_per_step: batches whose gradients are accumulated.
        epochs: passes over the questions; each drops the questions after its last whole step.
        max_steps: the most steps.
        seed: of the order.
        world_size: how many ranks share a step, with equally many batches each.
        rank: this process's.
        start: steps to skip, whose questions are not read.

    Returns:
        The number of steps, skipped ones included, and the batches of each of the others, as
        ``padded_collate_images`` makes them.

    Raises:
        DataError: if the questions are too few for one step.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(
        questions, world_size, rank, seed=seed, drop_last=True
    )
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    steps_per_epoch = len(batches) // batches_per_step
    num_steps = steps_per_epoch * epochs
    if not num_steps:
        raise DataError(
            f"{len(questions)} questions are too few for one step of {world_size} x {batch_size} x "
            f"{batches_per_step}."
        )
    if max_steps is not None:
        num_steps = min(num_steps, max_steps)

    def collated(samples: list[Any]) -> dict[str, Any]:
        return padded_collate_images(samples, questions.transform.pad_id)

    def steps() -> Iterator[Step]:
        for epoch in range(start // steps_per_epoch, epochs):
            sampler.set_epoch(epoch)
            taken = max(start - epoch * steps_per_epoch, 0) * batches_per_step
            left = list(islice(batches, taken, None))
            loader = iter(DataLoader(questions, batch_sampler=left, collate_fn=collated))
            while len(step := list(islice(loader, batches_per_step))) == batches_per_step:
                yield step

    return num_steps, islice(steps(), max(num_steps - start, 0))


def count_tokens(batch: Mapping[str, Any], transform: QuestionTransform) -> dict[str, int]:
    """Return the number of tokens of text and of images in a batch, without padding and markers.

    Args:
        batch: what ``padded_collate_images`` made.
        transform: the transform of the questions.
    """
    ids, mask = batch["tokens"], batch.get("encoder_mask")
    others = [transform.pad_id]
    if transform.image_token is not None:
        others.append(transform.image_token)
    return {
        "text": int((~torch.isin(ids, torch.tensor(others))).sum()),
        "image": 0 if mask is None else int(mask.any(dim=1).sum()),
    }
