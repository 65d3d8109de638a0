"""torchtune's loss, with which auxiliary losses of a model's layers are scaled.

torchtune's recipes multiply the loss by a number of tokens and divide gradients by it afterwards. This
class replaces torchtune's in their YAML. It has the same name, which the recipes compare:

    loss:
      _component_: torchfuse.training.torchtune_loss.CEWithChunkedOutputLoss
"""

from __future__ import annotations

import torchtune.modules.loss
from torch import Tensor

from torchfuse.modules.experts.auxiliary_loss import mark_main_loss

__all__ = ["CEWithChunkedOutputLoss"]


class CEWithChunkedOutputLoss(torchtune.modules.loss.CEWithChunkedOutputLoss):
    """torchtune's ``CEWithChunkedOutputLoss``, marked as the main loss (see ``mark_main_loss``)."""

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of chunks of logits ``[b, s / n, v]`` and labels ``[b, s]``."""
        return mark_main_loss(super().forward(logits, labels))
