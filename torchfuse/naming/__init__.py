"""Names of parameters, the same in every view, and the modules inside wrappers.

Only this package renames keys of torchfuse's own wrappers, and removes what other wrappers (activation
checkpointing, ``torch.compile``, DDP, a module that contains a fused model) add to a name.
"""

from torchfuse.naming.fused_model import ModelWithParts, find_model, named_parameters, unwrap_model
from torchfuse.naming.torch_wrappers import canonical_name, unwrap
from torchfuse.naming.transparent_wrapper import TransparentWrapper

__all__ = [
    "ModelWithParts",
    "TransparentWrapper",
    "canonical_name",
    "find_model",
    "named_parameters",
    "unwrap",
    "unwrap_model",
]
