"""What a training loop needs around a fused model."""

from torchfuse.training.loss import next_token_loss
from torchfuse.training.sharding import shard

__all__ = ["next_token_loss", "shard"]
