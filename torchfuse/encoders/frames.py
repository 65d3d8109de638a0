"""Clips: the frames of a row, padded to one length, encoded by an encoder of images.

A clip of ``f`` frames is ``f`` images a row, and its features are in the order of the frames,
``[b, f * n, d_e]``. Clips of different lengths are padded, with ``frame_mask`` ``[b, f]`` (True: the
frame is real). Padded frames are encoded too, so that shapes stay static, but as black images, and
``frame_features_mask`` turns the mask into the ``encoder_mask`` of every architecture: no value in a
padded frame, not even a NaN, affects a result.

A row without a real frame is a row of text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.naming import TransparentWrapper

__all__ = ["FrameEncoder", "frame_features_mask", "hide_padding"]


def hide_padding(images: Tensor, frame_mask: Tensor | None, *, min_frames: int = 0) -> Tensor:
    """Replace padded frames by zeros.

    Args:
        images: ``[b, f, ...]``, ``f`` images a row.
        frame_mask: bool ``[b, f]``, True: the frame is real. None: all are, and the images are returned
            unchanged.
        min_frames: the least number of real frames in a row. Fewer are an error on the CPU, and a
            device-side assertion, which does not synchronise, on accelerators and in graphs.

    Returns:
        The images, with zeros in padded frames.

    Raises:
        ModelError: if the mask does not fit the images, or rows have too few frames, naming them.

    Examples:
        >>> frames = torch.tensor([[1.0, float("nan")]])
        >>> hide_padding(frames[..., None], torch.tensor([[True, False]])).flatten().tolist()
        [1.0, 0.0]
    """
    if frame_mask is None:
        if images.shape[1] < min_frames:
            raise ModelError(
                f"Every row must have at least {min_frames} frames, got images {list(images.shape)}, "
                f"which are {images.shape[1]} a row."
            )
        return images
    if frame_mask.dtype != torch.bool or frame_mask.shape != images.shape[:2] or images.dim() < 3:
        raise ModelError(
            "frame_mask must be bool (True: the frame is real) with shape [b, f] for images "
            f"[b, f, ...], got {frame_mask.dtype} {list(frame_mask.shape)} for {list(images.shape)}."
        )
    if min_frames > 0:
        _check_counts(frame_mask, min_frames)
    real = frame_mask.view(*frame_mask.shape, *[1] * (images.dim() - 2))
    # No multiplication: zero times NaN is NaN.
    return torch.where(real, images, torch.zeros((), dtype=images.dtype, device=images.device))


def frame_features_mask(frame_mask: Tensor, num_tokens: int) -> Tensor:
    """Return which features are of a real frame, for ``encoder_mask``.

    Args:
        frame_mask: bool ``[b, f]``, True: the frame is real.
        num_tokens: features of one frame, after the adapter if there is one.

    Returns:
        Bool ``[b, f * num_tokens]``, True: may attend.

    Raises:
        ModelError: for another mask, or a number below one.

    Examples:
        >>> frame_features_mask(torch.tensor([[True, False]]), 3).int().tolist()
        [[1, 1, 1, 0, 0, 0]]
    """
    if frame_mask.dtype != torch.bool or frame_mask.dim() != 2 or num_tokens < 1:
        raise ModelError(
            "frame_mask must be bool [b, f] (True: the frame is real) and num_tokens at least 1, got "
            f"{frame_mask.dtype} {list(frame_mask.shape)} and {num_tokens}."
        )
    return frame_mask.unsqueeze(-1).expand(-1, -1, num_tokens).flatten(1)


class FrameEncoder(TransparentWrapper):
    """An encoder of one image a row, applied to several: frames of a clip, or images.

    ``ClipVisionEncoder``, ``HfEncoder`` and ``RandomEncoder`` take several themselves and need no
    wrapper. Parameters keep their names, and attributes of the encoder are the wrapper's
    (``feature_dim``, ``num_tokens``: of one frame).

    Args:
        encoder: takes images ``[b, c, h, w]`` as its first argument, returns features ``[b, n, d_e]``.
        min_frames: see ``hide_padding``.

    Examples:
        >>> class Patches(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(3, 6, kernel_size=4, stride=4)
        ...     def forward(self, images):
        ...         return self.conv(images).flatten(2).transpose(1, 2)
        >>> encoder = FrameEncoder(Patches())
        >>> encoder(torch.randn(2, 5, 3, 8, 8)).shape, list(encoder.state_dict())
        (torch.Size([2, 20, 6]), ['conv.weight', 'conv.bias'])
    """

    def __init__(self, encoder: nn.Module, *, min_frames: int = 0) -> None:
        super().__init__()
        self.min_frames = min_frames
        self.wrap(encoder, child="image_encoder")

    def example_input(self) -> dict[str, Tensor]:
        """Return the wrapped encoder's example, or a black image of its ``image_size``, as a clip.

        Raises:
            ModelError: if the encoder has neither.
        """
        example: Any = getattr(self.wrapped, "example_input", None)
        tensors = list(example().values()) if callable(example) else []
        size = getattr(self.wrapped, "image_size", None)
        if len(tensors) == 1:
            image = tensors[0]
        elif isinstance(size, int):
            image = torch.zeros(1, 3, size, size)
        else:
            raise ModelError(
                f"An input of {type(self.wrapped).__name__} is not known: pass example_input= with "
                "images [1, c, h, w], or give it an image_size."
            )
        if self.min_frames > 1:
            image = image.unsqueeze(1).expand(-1, self.min_frames, *image.shape[1:])
        return {"images": image}

    def forward(self, images: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """Encode the frames of each row.

        Args:
            images: ``[b, f, c, h, w]``, or ``[b, c, h, w]`` for one a row.
            frame_mask: bool ``[b, f]``, True: the frame is real. None: all are.

        Returns:
            Features ``[b, f * n, d_e]``, frame by frame, those of padding included: see
            ``frame_features_mask``.

        Raises:
            ModelError: if images, mask or features have another shape.
        """
        frames = images.unsqueeze(1) if images.dim() == 4 else images
        if frames.dim() != 5:
            raise ModelError(
                "A FrameEncoder takes images [b, f, c, h, w], or [b, c, h, w] for one a row, got "
                f"{list(images.shape)}."
            )
        frames = hide_padding(frames, frame_mask, min_frames=self.min_frames)
        features = self.wrapped(frames.flatten(0, 1))
        rows = frames.shape[:2]
        fits = isinstance(features, Tensor) and features.dim() == 3
        if not fits or features.shape[0] != rows.numel():
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ModelError(
                f"{type(self.wrapped).__name__} must return features [{rows.numel()}, n, d_e], a row "
                f"for each image, got {got}."
            )
        return features.unflatten(0, rows).flatten(1, 2)


def _check_counts(frame_mask: Tensor, min_frames: int) -> None:
    enough = frame_mask.sum(dim=1) >= min_frames
    if frame_mask.device.type == "meta":
        return
    if (
        frame_mask.device.type != "cpu"
        or torch.compiler.is_compiling()
        or type(frame_mask) is not Tensor
    ):
        torch._assert_async(enough.all(), f"a row has fewer than {min_frames} real frames")
        return
    few = (~enough).nonzero().flatten().tolist()
    if few:
        rows = ", ".join(f"row {row} has {int(frame_mask[row].sum())}" for row in few[:8])
        more = f", and {len(few) - 8} more rows have too few" if len(few) > 8 else ""
        raise ModelError(
            f"Every row must have at least {min_frames} of its {frame_mask.shape[1]} frames real (True "
            f"in frame_mask), but {rows}{more}."
        )
