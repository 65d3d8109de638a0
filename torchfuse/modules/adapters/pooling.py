"""Tokens as the cells of a square grid, and windows over them.

A vision tower gives the patches of an image row by row, with special tokens (class, registers) in front
or none, and a clip as its frames one after the other. So ``n`` tokens are ``f`` times ``p + g * g``.
With the side ``g`` given, the number of frames follows from ``n``; without it there is one frame, since
four grids of 5 x 5 have as many tokens as one of 10 x 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ModelError

__all__ = ["TokenGrid", "WindowAttention", "window_means"]

# Towers have at most a few tokens in front of their cells; a larger remainder has another reason.
_MAX_PREFIX_TOKENS: Final = 8


@dataclass(frozen=True)
class TokenGrid:
    """The layout of an encoder's tokens: frames, each a square grid with tokens in front of it.

    Attributes:
        side: cells along one side, ``g``. None: all tokens of a row are one frame.
        num_prefix_tokens: tokens in front of the cells of each frame, ``p``.

    Examples:
        >>> TokenGrid(side=5).split(100)  # four frames of 5 x 5
        (4, 5)
        >>> TokenGrid().split(100)
        (1, 10)
    """

    side: int | None = None
    num_prefix_tokens: int = 0

    def problems(self) -> list[str]:
        """Return which attributes are out of range."""
        problems = []
        if self.side is not None and self.side < 1:
            problems.append(f"grid={self.side} must be at least 1")
        if self.num_prefix_tokens < 0:
            problems.append(f"num_prefix_tokens={self.num_prefix_tokens} must be at least 0")
        return problems

    def split(self, num_tokens: int) -> tuple[int, int]:
        """Return the number of frames and the side of their grids.

        Raises:
            ModelError: if a number of tokens is no whole number of such frames.
        """
        front = self.num_prefix_tokens
        each = f"{front} + " if front else ""
        if self.side is not None:
            frame = front + self.side**2
            if num_tokens < 1 or num_tokens % frame:
                raise ModelError(
                    f"{num_tokens} tokens are no frames of {each}{self.side} x {self.side} = {frame} "
                    f"tokens each.{self._hint(num_tokens)}"
                )
            return num_tokens // frame, self.side
        side = math.isqrt(max(num_tokens - front, 0))
        if side < 1 or front + side * side != num_tokens:
            near = max(side, 1)
            raise ModelError(
                f"{num_tokens} tokens are no square grid{f' after {front} others' if front else ''}: "
                f"{each}{near} x {near} = {front + near**2} would be one. For several frames or images "
                f"a row, give the side of each grid as grid=.{self._hint(num_tokens)}"
            )
        return 1, side

    def _hint(self, num_tokens: int) -> str:
        """Return a hint if a few tokens in front of the cells would make it a grid."""
        side = self.side or math.isqrt(max(num_tokens, 0))
        for front in range(_MAX_PREFIX_TOKENS + 1) if side > 1 else ():
            frames = num_tokens / (front + side * side)
            if frames == 1 or (frames > 1 and frames == int(frames) and self.side is not None):
                return f" With num_prefix_tokens={front} (class token, registers) they would be."
        return ""


def window_means(cells: Tensor, window: int) -> Tensor:
    """Return the mean of each window of a grid; a window at the edge averages the cells that it has.

    Args:
        cells: ``[b, g, g, d]``.
        window: side of a window, in cells.

    Returns:
        ``[b, m, d]``, ``m = ceil(g / window) ** 2``, row by row.

    Examples:
        >>> import torch
        >>> window_means(torch.arange(9.0).view(1, 3, 3, 1), 2).flatten().tolist()
        [2.0, 3.5, 6.5, 8.0]
    """
    pooled = F.avg_pool2d(
        cells.permute(0, 3, 1, 2), window, ceil_mode=True, count_include_pad=False
    )  # [b, d, g', g']
    return pooled.flatten(2).transpose(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention with one query a window, its mean, over the window's cells.

    Args:
        dim: width of the cells and of the output.
        num_heads: attention heads; divides ``dim``.
        window: side of a window, in cells.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, cells: Tensor) -> Tensor:
        """Pool the windows of grids ``[b, g, g, d]`` to ``[b, m, d]``, row by row."""
        means = window_means(cells, self.window)
        # Windows share an axis with heads: as rows of a batch they could exceed a kernel's grid.
        q = (
            self.q_proj(means).unflatten(-1, (self.num_heads, 1, -1)).flatten(1, 2)
        )  # [b, m * heads, 1, h]
        k, v = self._windows(self.k_proj(cells)), self._windows(self.v_proj(cells))
        pooled = F.scaled_dot_product_attention(q, k, v)
        return self.output_proj(pooled.reshape(means.shape))

    def _windows(self, cells: Tensor) -> Tensor:
        """Return the cells of each window by head: ``[b, g, g, d]`` as ``[b, m * heads, cells, h]``."""
        num = cells.shape[1] // self.window
        # [b, rows of windows, rows of one, columns of windows, columns of one, heads, h]
        cut = cells.unflatten(-1, (self.num_heads, -1)).unflatten(2, (num, self.window))
        cut = cut.unflatten(1, (num, self.window)).permute(0, 1, 3, 5, 2, 4, 6)
        return cut.flatten(1, 3).flatten(2, 3)
