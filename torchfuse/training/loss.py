"""The loss of next-token prediction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.modules.experts.auxiliary_loss import mark_main_loss

__all__ = ["next_token_loss"]


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    loss_weights: Tensor | None = None,
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

    Returns:
        The sum, and the number of labels in it, or the sum of their weights. Both are zero, with a
        gradient of zero, where no label counts.

    Raises:
        ModelError: if the weights have another shape than the labels.

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
    targets = labels[:, 1:].flatten()
    scores = logits[:, :-1].flatten(0, 1).float()
    if loss_weights is None:
        total = F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum")
        count = (targets != ignore_index).sum()
    else:
        if loss_weights.shape != labels.shape:
            raise ModelError(
                f"loss_weights must be {list(labels.shape)} as the labels are, got "
                f"{list(loss_weights.shape)}."
            )
        weights = loss_weights[:, 1:].flatten().float().masked_fill(targets == ignore_index, 0)
        counted = targets.masked_fill(weights == 0, ignore_index)
        each = F.cross_entropy(scores, counted, ignore_index=ignore_index, reduction="none")
        total, count = (weights * each).sum(), weights.sum()
    return mark_main_loss(total, count), count
