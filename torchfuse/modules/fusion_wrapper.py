"""A wrapper that adds new weights to a pretrained module, under one name."""

from __future__ import annotations

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming import TransparentWrapper, canonical_name

__all__ = ["FusionWrapper"]


class FusionWrapper(TransparentWrapper):
    """A wrapper whose new parameters are under ``fusion_layer.`` and are all that fusion added."""

    fusion_layer: nn.Module

    def fusion_params(self) -> list[str]:
        """The names, relative to this module, of the parameters that fusion added."""
        return [f"fusion_layer.{canonical_name(n)}" for n, _ in self.fusion_layer.named_parameters()]

    def refuse_sharded(self) -> None:
        """Raise a ``ModelError`` if the wrapped module is sharded as a module of its own.

        For wrappers that run its parts and not the module itself: nothing would gather its weights.
        """
        if hasattr(self.wrapped, "unshard"):
            raise ModelError(
                f"The layer inside this {type(self).__name__} is sharded as a module of its own, but "
                "the wrapper runs its parts, so its weights would never be gathered. Shard with "
                "torchfuse.training.shard, or call fully_shard on the wrapper instead."
            )
