"""The loss on reference answers: how probable a model finds them, instead of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.samples import Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.generation.decode import evaluation_mode
from torchfuse.naming import find_model
from torchfuse.tasks.image_inputs import fit_to_encoder
from torchfuse.training.loss import next_token_loss

__all__ = ["AnswerLoss", "answer_losses"]


@dataclass(frozen=True)
class AnswerLoss:
    """The loss on the answers of a sample.

    Attributes:
        total: the sum over tokens, in nats.
        count: the number of tokens, or the sum of their weights.
        is_greedy: whether each token is the most probable one after those before it.
    """

    total: float
    count: float
    is_greedy: bool

    @property
    def mean(self) -> float:
        """The loss a token."""
        return self.total / self.count


@torch.no_grad()
def answer_losses(
    model: nn.Module,
    transform: SampleTransform,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    desc: str = "loss",
) -> list[AnswerLoss]:
    """Compute the loss on the answers of samples, as in training.

    Args:
        model: a fused model without caches; it is put into evaluation mode for the call.
        transform: turns samples into tokens, labels and pixels; every answer of a conversation counts,
            with the end of its turn and its weight.
        samples: conversations with answers.
        batch_size: samples in a batch; those of similar length share one.
        desc: label of the progress bar.

    Returns:
        The losses, in the order of the samples.

    Raises:
        DataError: if a sample has no answer or is too long.
    """
    from torchtune.utils import batch_to_device

    model = find_model(model)
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: transform.length(samples[i]))
    losses: dict[int, AnswerLoss] = {}
    with evaluation_mode(model), tqdm(total=len(samples), desc=desc, disable=None, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = padded_collate_images([transform(samples[i]) for i in indices], transform.pad_id)
            batch_to_device(batch, device)
            losses |= zip(indices, _row_losses(model, fit_to_encoder(model, batch)), strict=True)
            bar.update(len(indices))
    return [losses[i] for i in range(len(samples))]


def _row_losses(model: nn.Module, batch: dict[str, Any]) -> list[AnswerLoss]:
    labels, weights = batch.pop("labels"), batch.pop("loss_weights", None)
    logits = model(**batch)
    losses = []
    for row in range(len(labels)):
        at = slice(row, row + 1)
        given = None if weights is None else weights[at]
        total, count = next_token_loss(logits[at], labels[at], loss_weights=given)
        learned = labels[row, 1:] >= 0
        likeliest = logits[row, :-1][learned].argmax(-1)
        is_greedy = bool((likeliest == labels[row, 1:][learned]).all())
        losses.append(AnswerLoss(float(total), float(count), is_greedy))
    return losses
