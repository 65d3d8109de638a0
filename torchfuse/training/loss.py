"""The loss of next-token prediction."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.modules.experts.auxiliary_loss import mark_main_loss

__all__ = ["next_token_loss"]


class LossOptions(TypedDict, total=False):
    """What is added to the cross-entropy: see ``next_token_loss``."""

    z_loss: float
    label_smoothing: float


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of next-token prediction, as a sum and the number of tokens in it.

    Logits at position ``t`` score the label at ``t + 1``: the shift happens here, once. Divide the sum
    by the number of tokens of the whole optimizer step, over micro-batches and ranks, so that every
    token weighs the same. Auxiliary losses of the model's layers are scaled with the sum (see
    ``torchfuse.modules.mark_main_loss``).

    Args:
        logits: ``[b, s, v]``.
        labels: ids aligned with the tokens, ``[b, s]``; ``ignore_index`` where nothing is to be learned.
        ignore_index: the label that does not count. In rows of several documents it is the label of
            each document's first token, as in those of ``torchfuse.data.pack``: the token before it is
            of another document.
        loss_weights: factors of the labels' losses, ``[b, s]``, at least 0. None: 1 each.
        z_loss: factor of the squared logarithm of each softmax's denominator, which is added to the loss
            of its label (Chowdhery et al., 2022, section 5).
        label_smoothing: see ``torch.nn.functional.cross_entropy``.

    Returns:
        The sum, and the number of labels in it, or the sum of their weights. Both are zero, with a
        gradient of zero, where no label counts.

    Raises:
        ModelError: if labels or weights have another shape than the logits.

    Examples:
        >>> import torch
        >>> total, count = next_token_loss(torch.zeros(1, 3, 7), torch.tensor([[-100, 2, 5]]))
        >>> round(float(total / count), 4), int(count)  # ln 7
        (1.9459, 2)
        >>> weights = torch.tensor([[1.0, 0.5, 0.0]])
        >>> total, count = next_token_loss(
        ...     torch.zeros(1, 3, 7), torch.tensor([[-100, 2, 5]]), loss_weights=weights
        ... )
        >>> round(float(total / count), 4), float(count)
        (1.9459, 0.5)
    """
    targets, weights = shifted_targets(labels, logits.shape[:2], ignore_index, loss_weights)
    scores = logits[:, :-1].flatten(0, 1).float()
    total = summed_loss(
        scores,
        targets.flatten(),
        None if weights is None else weights.flatten(),
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
    )
    count = (targets != ignore_index).sum() if weights is None else weights.sum()
    return mark_main_loss(total, count), count


def shifted_targets(
    labels: Tensor, shape: torch.Size, ignore_index: int, loss_weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the labels that positions ``0 .. s - 2`` predict, and their weights, each ``[b, s - 1]``.

    Labels of weight 0 become ``ignore_index``, and the weights of those that do not count are 0.

    Raises:
        ModelError: if labels or weights are not of this shape, ``[b, s]``.
    """
    for name, given in (("labels", labels), ("loss_weights", loss_weights)):
        if given is not None and given.shape != shape:
            raise ModelError(f"{name} must be {list(shape)} as the tokens are, got {list(given.shape)}.")
    targets = labels[:, 1:]
    if loss_weights is None:
        return targets, None
    weights = loss_weights[:, 1:].float().masked_fill(targets == ignore_index, 0)
    return targets.masked_fill(weights == 0, ignore_index), weights


def summed_loss(
    scores: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the weighted sum of the losses of scores ``[n, v]`` in fp32 for targets ``[n]``."""
    each = F.cross_entropy(
        scores,
        targets,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum" if weights is None and not z_loss else "none",
    )
    if z_loss:
        squared = scores.logsumexp(dim=-1).square()
        each = each + z_loss * squared.masked_fill(targets == ignore_index, 0)
    return each.sum() if weights is None else (weights * each).sum()
