"""Masks from token ids: what may attend to what. True means may attend, everywhere.

All helpers take and return whole batches with static shapes, on any device, without waiting for it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.errors import ConfigError, ModelError

__all__ = ["ImageScope", "causal_mask", "image_mask", "left_padding", "positions"]

ImageScope = Literal["all", "group", "last"]


def left_padding(tokens: Tensor, pad_id: int) -> Tensor:
    """Return which tokens count in rows that are padded on the left.

    Args:
        tokens: ids, ``[b, s]``.
        pad_id: the padding's id. In the middle of a row it is a token like any other.

    Returns:
        Bool ``[b, s]``, True from the first token that is not padding.

    Examples:
        >>> left_padding(torch.tensor([[0, 0, 5, 0]]), pad_id=0).tolist()
        [[False, False, True, True]]
    """
    return (tokens != pad_id).cumsum(dim=1) > 0


def positions(valid: Tensor) -> Tensor:
    """Return positions counted from the first token that counts.

    Args:
        valid: which tokens count, bool ``[b, s]``.

    Returns:
        ``[b, s]``; 0 at padding.
    """
    return (valid.cumsum(dim=1) - 1).clamp(min=0)


def causal_mask(
    valid: Tensor, *, document_ids: Tensor | None = None, slots: int | None = None
) -> Tensor:
    """Return a causal mask: each token attends to itself and to valid tokens before it.

    Args:
        valid: which tokens count, bool ``[b, s]``. One that does not attends to itself alone, so that
            its softmax is defined.
        document_ids: which document each token belongs to, ``[b, s]``, where several are packed into a
            row; nothing attends to another document.
        slots: width of a cache that is wider than the sequence; slots after it are masked out.

    Returns:
        Bool ``[b, s, s]``, or ``[b, s, slots]``.

    Raises:
        ModelError: if there are fewer slots than tokens.

    Examples:
        >>> causal_mask(torch.tensor([[False, True, True]])).int().tolist()
        [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]
    """
    s = valid.shape[1]
    if slots is not None and slots < s:
        raise ModelError(f"{s} tokens do not fit into {slots} slots.")
    mask = torch.ones(s, s, dtype=torch.bool, device=valid.device).tril() & valid[:, None, :]
    if document_ids is not None:
        mask = mask & (document_ids[:, :, None] == document_ids[:, None, :])
    mask = mask | torch.eye(s, dtype=torch.bool, device=valid.device)
    return mask if slots is None else F.pad(mask, (0, slots - s))


def image_mask(
    tokens: Tensor,
    image_token: int,
    *,
    features_per_image: int,
    num_images: int,
    markers_per_image: int = 1,
    scope: ImageScope = "all",
    document_ids: Tensor | None = None,
) -> Tensor:
    """Return which tokens may attend to which images, by the positions of the images' markers.

    A token never attends to an image whose marker comes later; a row without markers attends to none.

    Args:
        tokens: ids, ``[b, s]``.
        image_token: id of the marker.
        features_per_image: features that an image has.
        num_images: images of the row with the most; in the others the last ones are masked out.
        markers_per_image: how many consecutive markers represent one image.
        scope: ``"all"``: every image before the token; ``"last"``: the one before it (Flamingo,
            https://arxiv.org/abs/2204.14198); ``"group"``: the images before it that no text separates
            (Llama 3.2 Vision).
        document_ids: which document each token belongs to, ``[b, s]``, where several are packed into a
            row; an image belongs to the document of its marker.

    Returns:
        Bool ``[b, s, num_images * features_per_image]``.

    Raises:
        ConfigError: for an unknown scope or a number below one.

    Examples:
        >>> tokens = torch.tensor([[9, 1, 9, 2]])  # image, text, image, text
        >>> image_mask(tokens, 9, features_per_image=1, num_images=2).int().tolist()
        [[[1, 0], [1, 0], [1, 1], [1, 1]]]
        >>> image_mask(tokens, 9, features_per_image=1, num_images=2, scope="last").int().tolist()
        [[[1, 0], [1, 0], [0, 1], [0, 1]]]
    """
    if scope not in ("all", "group", "last"):
        raise ConfigError(f'scope must be "all", "group" or "last", got {scope!r}.')
    if min(features_per_image, markers_per_image) < 1 or num_images < 0:
        raise ConfigError(
            "image_mask needs at least one feature and one marker an image, got "
            f"features_per_image={features_per_image}, markers_per_image={markers_per_image}, "
            f"num_images={num_images}."
        )
    marker = tokens == image_token
    count = marker.cumsum(dim=1)  # [b, s]
    begun = torch.div(count + markers_per_image - 1, markers_per_image, rounding_mode="floor")
    image = torch.arange(num_images, device=tokens.device)
    seen = begun[:, :, None] > image  # [b, s, images]
    # The token that is an image's first marker.
    first = marker[:, :, None] & (count[:, :, None] == image * markers_per_image + 1)
    if scope == "last":
        seen = seen & (begun[:, :, None] == image + 1)
    elif scope == "group":
        starts = marker & ~F.pad(marker, (1, 0))[:, :-1]
        group = starts.cumsum(dim=1)
        seen = seen & (group[:, :, None] == _at(first, group)[:, None, :])
    if document_ids is not None:
        seen = seen & (document_ids[:, :, None] == _at(first, document_ids)[:, None, :])
    return seen.repeat_interleave(features_per_image, dim=2)


def _at(first: Tensor, values: Tensor) -> Tensor:
    """Return ``values`` ``[b, s]`` at the first marker of each image, ``[b, images]``."""
    return (first * values[:, :, None]).sum(dim=1)
