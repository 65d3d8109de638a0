"""Encoder outputs that were computed before: input of a fused model in place of an encoder's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from torchfuse.errors import ModelError

__all__ = ["ENCODER_OUTPUT", "computed_before"]

ENCODER_OUTPUT: Final = "encoder_output"
"""The keyword of an encoder's output, in place of the encoder's own keywords."""


def computed_before(name: str, encoder: nn.Module, encoder_input: Any) -> Tensor | None:
    """Return the output of an encoder, ``[b, n, d_e]``, if its input is that; None otherwise.

    Args:
        name: of the encoder, for messages.
        encoder: the encoder.
        encoder_input: keywords of the encoder, or ``encoder_output`` alone: ``[b, n, d_e]``, or
            ``[b, ..., n, d_e]`` for several images a row.

    Raises:
        ModelError: if there is another keyword or shape, or the encoder trains.
    """
    if not isinstance(encoder_input, Mapping) or ENCODER_OUTPUT not in encoder_input:
        return None
    training = [key for key, p in encoder.named_parameters() if p.requires_grad]
    if training:
        raise ModelError(
            f"The output of {name!r} was computed before, and {len(training)} of its parameters train "
            f"({training[0]}, ...): give the encoder its own keywords, or freeze it."
        )
    features = encoder_input[ENCODER_OUTPUT]
    if len(encoder_input) > 1 or not isinstance(features, Tensor) or features.dim() < 3:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(
            f"{ENCODER_OUTPUT} must be the only keyword of {name!r}, and have shape [b, n, d_e] or "
            f"[b, ..., n, d_e]. Got {', '.join(encoder_input)}, and {got}."
        )
    return features.flatten(1, -2)
