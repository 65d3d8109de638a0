"""Conversion of tile embeddings between a table and a grid, and the mask of tiles for text.

transformers holds one row for each aspect ratio, ``[ids + 1, tiles, n, d]`` with id 0 for images that
pad a row; Meta and torchtune hold one grid ``[t, t, n, d]`` of which every aspect ratio takes a corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchfuse.errors import ModelError

__all__ = ["AspectRatios", "encoder_mask_of_tiles", "grid_to_table", "ratio_problems", "table_to_grid"]

AspectRatios = Sequence[Sequence[int]]


def encoder_mask_of_tiles(
    cross_attention_mask: Tensor, tokens_per_tile: int, max_num_tiles: int | None = None
) -> Tensor:
    """Expand a mask over tiles to a mask over features.

    Args:
        cross_attention_mask: ``[b, s, m, t]``, True (or 1): may attend, as transformers' processor
            makes it.
        tokens_per_tile: features of one tile.
        max_num_tiles: tiles that the tower pads to; those beyond ``t`` are masked out. None: ``t``.

    Returns:
        An ``encoder_mask``, bool ``[b, s, m * max_num_tiles * tokens_per_tile]``, True: may attend.

    Raises:
        ModelError: for a mask of another shape, or with more tiles than ``max_num_tiles``.

    Examples:
        >>> encoder_mask_of_tiles(torch.tensor([[[[1, 0]], [[0, 0]]]]), tokens_per_tile=2).int()
        tensor([[[1, 1, 0, 0],
                 [0, 0, 0, 0]]], dtype=torch.int32)
    """
    t = cross_attention_mask.shape[-1]
    if cross_attention_mask.dim() != 4 or t > (max_num_tiles or t):
        raise ModelError(
            f"cross_attention_mask must be [b, s, m, t] with t up to {max_num_tiles or 'any number'}, "
            f"got {list(cross_attention_mask.shape)}."
        )
    mask = F.pad(cross_attention_mask != 0, (0, (max_num_tiles or t) - t))
    return mask.repeat_interleave(tokens_per_tile, dim=-1).flatten(2)


def grid_to_table(grid: Tensor, aspect_ratios: AspectRatios, max_num_tiles: int) -> Tensor:
    """Convert an embedding of tiles from Meta's and torchtune's grid to transformers' table.

    The table is the form of ``MllamaVisionEncoder``.

    Args:
        grid: ``[t, t, n, d]``; an image of (h, w) tiles has the corner ``[:h, :w]``.
        aspect_ratios: (tiles high, tiles wide) of the ids 1, 2, ...
        max_num_tiles: tiles that every image is padded to.

    Returns:
        ``[ids + 1, max_num_tiles, n, d]``, zero for padding tiles and for images that pad a row (id
        0).

    Raises:
        ModelError: if an aspect ratio does not fit the grid or ``max_num_tiles``.

    Examples:
        >>> grid = torch.arange(4.0).view(2, 2, 1, 1)
        >>> grid_to_table(grid, [(1, 1), (1, 2), (2, 1)], max_num_tiles=2).flatten(1)
        tensor([[0., 0.],
                [0., 0.],
                [0., 1.],
                [0., 2.]])
    """
    problems = ratio_problems(aspect_ratios, max_num_tiles)
    if grid.dim() != 4 or grid.shape[0] != grid.shape[1]:
        problems.append(f"the grid must be [t, t, n, d], got {list(grid.shape)}")
    elif max((max(ratio) for ratio in aspect_ratios), default=0) > grid.shape[0]:
        problems.append(
            f"a grid of {grid.shape[0]} x {grid.shape[0]} tiles is too small for all of them"
        )
    if problems:
        raise ModelError(f"Aspect ratios {list(aspect_ratios)}: {'; '.join(problems)}.")
    table = grid.new_zeros(len(aspect_ratios) + 1, max_num_tiles, *grid.shape[2:])
    for index, (h, w) in enumerate(aspect_ratios, start=1):
        table[index, : h * w] = grid[:h, :w].flatten(0, 1)
    return table


def table_to_grid(table: Tensor, aspect_ratios: AspectRatios) -> Tensor:
    """Convert an embedding of tiles from transformers' table to Meta's and torchtune's grid.

    Args:
        table: ``[ids + 1, t, n, d]``.
        aspect_ratios: (tiles high, tiles wide) of the ids 1, 2, ...

    Returns:
        ``[t, t, n, d]``, which ``grid_to_table`` converts back to the same table; zero outside of all
        aspect ratios.

    Raises:
        ModelError: if a grid cannot hold the table: aspect ratios that share a tile disagree on it,
            or padding tiles or the padding image have values other than zero.

    Examples:
        >>> table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]).view(3, 2, 1, 1)
        >>> table_to_grid(table, [(1, 1), (1, 2)])[..., 0, 0]
        tensor([[1., 2.],
                [0., 0.]])
    """
    if table.dim() != 4 or table.shape[0] != len(aspect_ratios) + 1:
        raise ModelError(
            f"The table of {len(aspect_ratios)} aspect ratios must be [{len(aspect_ratios) + 1}, t, n, "
            f"d], got {list(table.shape)}."
        )
    t = table.shape[1]
    problems = ratio_problems(aspect_ratios, t)
    if problems:
        raise ModelError(f"Aspect ratios {list(aspect_ratios)}: {'; '.join(problems)}.")
    grid = table.new_zeros(t, t, *table.shape[2:])
    for index, (h, w) in enumerate(aspect_ratios, start=1):
        grid[:h, :w] = table[index, : h * w].unflatten(0, (h, w))
    back = grid_to_table(grid, aspect_ratios, t)
    lost = [index for index in range(len(table)) if not torch.equal(back[index], table[index])]
    if lost:
        raise ModelError(
            f"A grid cannot hold rows {lost} of this table: aspect ratios {list(aspect_ratios)}, rows 1 "
            f"to {len(aspect_ratios)}, must agree on the tiles that they share, and tiles beyond h * w, "
            "and row 0, must be zero. Keep the table."
        )
    return grid


def ratio_problems(aspect_ratios: AspectRatios, max_num_tiles: int) -> list[str]:
    """List what is wrong with aspect ratios."""
    ratios = [tuple(ratio) for ratio in aspect_ratios]
    bad = [r for r in ratios if len(r) != 2 or min(r) < 1 or r[0] * r[1] > max_num_tiles]
    problems = [f"aspect ratios {bad} must be (h, w) with 1 to {max_num_tiles} tiles"] if bad else []
    if len(set(ratios)) < len(ratios):
        problems.append(f"aspect ratios {ratios} must all be different")
    return problems if ratios else ["at least one aspect ratio is needed"]
