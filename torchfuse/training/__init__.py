"""Training: the loss, sharding, and configurations of recipes."""

from torchfuse.components import build
from torchfuse.training.config import recipe
from torchfuse.training.device import device_and_dtype
from torchfuse.training.linear_loss import linear_next_token_loss
from torchfuse.training.loss import next_token_loss
from torchfuse.training.record import TrainingRecord
from torchfuse.training.sharding import shard

__all__ = [
    "TrainingRecord",
    "build",
    "device_and_dtype",
    "linear_next_token_loss",
    "next_token_loss",
    "recipe",
    "shard",
]
