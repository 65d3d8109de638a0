"""Training: losses, precision, memory and its estimate, sharding, and configurations of recipes."""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.components import build
from torchfuse.training.config import recipe
from torchfuse.training.device import device_and_dtype
from torchfuse.training.linear_loss import linear_next_token_loss
from torchfuse.training.loss import next_token_loss
from torchfuse.training.memory import offload_activations, step_in_backward
from torchfuse.training.parallel.layers import checkpoint_activations, compile_layers
from torchfuse.training.parallel.sharding import shard
from torchfuse.training.precision import computing_in, keep_in_fp32
from torchfuse.training.record import TrainingRecord

if TYPE_CHECKING:
    from torchfuse.training.estimation.estimate import estimate
    from torchfuse.training.estimation.result import Estimate
    from torchfuse.training.estimation.simulate import StepSettings

__all__ = [
    "Estimate",
    "StepSettings",
    "TrainingRecord",
    "build",
    "checkpoint_activations",
    "compile_layers",
    "computing_in",
    "device_and_dtype",
    "estimate",
    "keep_in_fp32",
    "linear_next_token_loss",
    "next_token_loss",
    "offload_activations",
    "recipe",
    "shard",
    "step_in_backward",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Estimate": "estimation.result",
        "StepSettings": "estimation.simulate",
        "estimate": "estimation.estimate",
    },
)
