"""Checks of calls whose rows hold several documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchfuse.errors import ModelError
from torchfuse.models.types import EncoderFeatures

__all__ = ["check_document_ids", "check_documents"]


def check_document_ids(model: Any, tokens: Tensor, document_ids: Tensor, mask: Tensor | None) -> None:
    """Raise a ``ModelError`` if a fused model cannot use document ids in a call.

    Args:
        model: the fused model.
        tokens: ids, ``[b, s]``.
        document_ids: the document of each token.
        mask: the mask of the call.
    """
    problems = []
    if document_ids.shape != tokens.shape or document_ids.is_floating_point():
        problems.append(
            f"they must be integers {list(tokens.shape)} as the tokens are, got {document_ids.dtype} "
            f"{list(document_ids.shape)}"
        )
    if mask is not None:
        problems.append("they take the place of mask, so give one of them")
    if model.caches_are_enabled():
        problems.append("caches hold one document a row: delete them, or call without")
    if not model.strategy.takes_documents:
        problems.append(
            f"{type(model.strategy).__name__} has takes_documents=False: its rows hold one document"
        )
    if problems:
        raise ModelError(f"document_ids cannot be used: {'; '.join(problems)}.")


def check_documents(features: Mapping[str, EncoderFeatures]) -> None:
    """Raise a ``ModelError`` unless masks tell which document may attend to which feature."""
    for name, given in features.items():
        if given.present and (given.mask is None or given.mask.dim() != 3):
            got = "none" if given.mask is None else list(given.mask.shape)
            raise ModelError(
                f"Rows hold several documents, so the encoder_mask of {name!r} must be [b, s, n]: True "
                f"where a token may attend to a feature, of its own document alone. Got {got}."
            )
