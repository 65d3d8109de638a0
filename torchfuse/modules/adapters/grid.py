"""Adapters that pool windows of a square grid of tokens, so that fewer tokens come out.

A mask over features counts what an adapter returns, not what it gets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.adapters.base import Adapter, register_adapter
from torchfuse.modules.adapters.pooling import TokenGrid, WindowAttention, window_means

__all__ = ["AttentionalPoolAdapter", "AvgPoolAdapter"]


class _GridAdapter(Adapter):
    """Windows of each frame's grid, pooled, then one linear map.

    Subclasses describe the options.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        window: int = 2,
        grid: int | None = None,
        num_prefix_tokens: int = 0,
        keep_prefix: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim)
        self.grid = TokenGrid(grid, num_prefix_tokens)
        self.window, self.keep_prefix = window, keep_prefix
        problems = self.grid.problems()
        if window < 1:
            problems.append(f"window={window} must be at least 1")
        elif grid is not None:
            problems += self._side_problems(grid)
        if problems:
            raise ConfigError(f"{self.name}: {'; '.join(problems)}.")
        self.linear = nn.Linear(in_dim, out_dim)

    def _side_problems(self, side: int) -> list[str]:
        """Return why windows cannot cover a grid of this side."""
        return []

    @abstractmethod
    def _pool(self, cells: Tensor) -> Tensor:
        """Pool the windows of grids ``[b, g, g, in_dim]`` to ``[b, m, in_dim]``."""

    @classmethod
    def options_for(cls, num_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        front = given.get("num_prefix_tokens", 0)
        if given.get("grid") is not None or not isinstance(front, int):
            return {}
        try:
            return {"grid": TokenGrid(None, front).split(num_tokens)[1]}
        except ValueError as error:
            raise ConfigError(f"{cls.name}: for the encoder's image, {error}") from error

    def options(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "grid": self.grid.side,
            "num_prefix_tokens": self.grid.num_prefix_tokens,
            "keep_prefix": self.keep_prefix,
        }

    def _split(self, num_tokens: int) -> tuple[int, int]:
        """Return the number of frames and the side of their grids for a number of tokens."""
        try:
            frames, side = self.grid.split(num_tokens)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error
        if problems := self._side_problems(side):
            raise ModelError(f"{self.name} of {num_tokens} tokens: {'; '.join(problems)}.")
        return frames, side

    def forward(self, features: Tensor) -> Tensor:
        frames, side = self._split(features.shape[1])
        each = features.unflatten(1, (frames, -1)).flatten(0, 1)  # [b * frames, p + side * side, in_dim]
        prefix, cells = each.split([self.grid.num_prefix_tokens, side * side], dim=1)
        pooled = self._pool(cells.unflatten(1, (side, side)))
        if self.keep_prefix and self.grid.num_prefix_tokens:
            pooled = torch.cat([prefix, pooled], dim=1)
        return self.linear(pooled).unflatten(0, (features.shape[0], frames)).flatten(1, 2)

    def output_num_tokens(self, num_tokens: int) -> int:
        frames, side = self._split(num_tokens)
        kept = self.grid.num_prefix_tokens if self.keep_prefix else 0
        return frames * (kept + (-(-side // self.window)) ** 2)


@register_adapter("avgpool")
class AvgPoolAdapter(_GridAdapter):
    """The mean of each window of a square grid of tokens, then one linear map.

    A grid of ``g`` x ``g`` leaves ``ceil(g / window) ** 2`` tokens, row by row; a window at the edge
    averages the cells that it has. Frames of a clip, and several images a row, come one after the
    other and are pooled separately.

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        window: side of a window, in cells.
        grid: side of the grid of one frame. None: a row is one frame, whose side is the square root of
            its tokens; to be given for clips and for several images a row.
        num_prefix_tokens: tokens in front of each frame's cells that are no cells, such as CLIP's class
            token (576 patches come as 577 with ``keep_cls=True``).
        keep_prefix: True: these are kept unpooled, in front of their frame's windows; False: they are
            dropped.

    Raises:
        ConfigError: for options out of range.
        ModelError: in ``forward`` and ``output_num_tokens``, for a number of tokens that is no such
            grid.

    Examples:
        >>> adapter = AvgPoolAdapter(5, 7, window=2, grid=3)
        >>> adapter(torch.randn(2, 4 * 9, 5)).shape  # two rows of four frames of 3 x 3
        torch.Size([2, 16, 7])
    """

    def _pool(self, cells: Tensor) -> Tensor:
        return window_means(cells, self.window)


@register_adapter("attentional_pool")
class AttentionalPoolAdapter(_GridAdapter):
    """Attention over each window of a square grid of tokens, then one linear map.

    The query is the window's mean, keys and values are its cells; there are projections of all three and
    of what comes out, with biases.

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        window: side of a window, in cells; divides the side of the grid.
        num_heads: attention heads; divides ``in_dim``.
        grid: see ``AvgPoolAdapter``.
        num_prefix_tokens: see ``AvgPoolAdapter``.
        keep_prefix: see ``AvgPoolAdapter``.

    Raises:
        ConfigError: for options out of range; if ``num_heads`` does not divide ``in_dim``, or ``window``
            the side of the grid.
        ModelError: as ``AvgPoolAdapter``.

    Examples:
        >>> adapter = AttentionalPoolAdapter(6, 7, window=2, num_heads=3)
        >>> adapter(torch.randn(2, 16, 6)).shape
        torch.Size([2, 4, 7])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        window: int = 2,
        num_heads: int = 8,
        grid: int | None = None,
        num_prefix_tokens: int = 0,
        keep_prefix: bool = True,
    ) -> None:
        super().__init__(
            in_dim,
            out_dim,
            window=window,
            grid=grid,
            num_prefix_tokens=num_prefix_tokens,
            keep_prefix=keep_prefix,
        )
        if num_heads < 1 or in_dim % num_heads:
            raise ConfigError(f"{self.name}: num_heads={num_heads} must divide the width {in_dim}.")
        self.attention = WindowAttention(in_dim, num_heads, window)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "num_heads": self.attention.num_heads}

    def _side_problems(self, side: int) -> list[str]:
        problem = f"window={self.window} must divide the side {side} of the grid"
        return [problem] if side % self.window else []

    def _pool(self, cells: Tensor) -> Tensor:
        return self.attention(cells)
