"""The loss of next-token prediction."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torchfuse.modules.experts.auxiliary_loss import mark_main_loss

__all__ = ["next_token_loss"]


def next_token_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Cross-entropy of next-token prediction, as a sum and the number of tokens in it.

    Logits at position ``t`` score the label at ``t + 1``: the shift happens here, once. Divide the sum
    by the number of tokens of the whole optimizer step, over micro-batches and ranks, so that every
    token weighs the same. Auxiliary losses of the model's layers are scaled with the sum (see
    ``torchfuse.modules.mark_main_loss``).

    Args:
        logits: ``[b, s, v]``.
        labels: ids aligned with the tokens, ``[b, s]``; ``ignore_index`` where nothing is to be learned.
        ignore_index: the label that does not count.

    Returns:
        The sum, and the number of labels in it. Both are zero, with a gradient of zero, where no label
        counts.

    Examples:
        >>> import torch
        >>> total, count = next_token_loss(torch.zeros(1, 3, 7), torch.tensor([[-100, 2, 5]]))
        >>> round(float(total / count), 4), int(count)  # ln 7
        (1.9459, 2)
    """
    targets = labels[:, 1:].flatten()
    scores = logits[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(scores, targets, ignore_index=ignore_index, reduction="sum")
    count = (targets != ignore_index).sum()
    return mark_main_loss(total, count), count
