"""Rows of new tokens of a pretrained table: initializing, resetting, appending and merging them.

``FusionEmbedding`` and ``FusionLinear`` both are a pretrained module with a small one of the same kind
below it, and share these functions on the rows of the small one. A row is one token's values in each
parameter: a row of ``weight`` and, if there is one, an entry of ``bias``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError

__all__ = [
    "RowInit",
    "append_rows",
    "check_num_new",
    "check_sizes",
    "first_rows",
    "merged_parameters",
    "reset_rows",
    "rows_are_means",
]

RowInit = Literal["mean", "normal"] | Tensor


def check_sizes(owner: str, **sizes: int) -> None:
    """Check that sizes are at least 1, with one error for all.

    Args:
        owner: the class whose sizes they are.
        sizes: the sizes by name.

    Raises:
        ConfigError: if one is not positive.
    """
    bad = [f"{name}={size}" for name, size in sizes.items() if size < 1]
    if bad:
        raise ConfigError(f"{owner} needs positive sizes, got {', '.join(bad)}.")


def check_num_new(num_new: int) -> None:
    """Check that at least one token is added.

    Raises:
        ConfigError: if ``num_new`` is not positive.
    """
    if num_new < 1:
        raise ConfigError(f"num_new must be at least 1, got {num_new}.")


@torch.no_grad()
def first_rows(pretrained: nn.Module, num_new: int, init: RowInit) -> dict[str, Tensor]:
    """Return the first values of the rows of new tokens.

    Args:
        pretrained: an embedding or a linear layer; of a fusion module only the pretrained rows are used.
        num_new: number of new tokens.
        init: ``"mean"``: each row the mean of the pretrained rows. ``"normal"``: drawn per column with
            the mean and the deviation of the pretrained rows. A tensor ``[num_new, d]``: these values,
            and a bias is the mean.

    Returns:
        ``weight`` ``[num_new, d]`` and, if there is a bias, ``bias`` ``[num_new]``, in the dtypes of
        the pretrained ones.

    Raises:
        ConfigError: if ``init`` is neither a known name nor a tensor.
        ModelError: if it is a tensor of another shape.

    Examples:
        >>> rows = first_rows(nn.Linear(3, 11), 2, "mean")
        >>> {name: list(values.shape) for name, values in rows.items()}
        {'weight': [2, 3], 'bias': [2]}
    """
    tables = _tables(pretrained)
    rows = {"weight": _rows(tables["weight"], num_new, init)}
    if "bias" in tables:
        # A bias is one more column of the table.
        column = tables["bias"][:, None]
        rows["bias"] = _rows(column, num_new, "mean" if isinstance(init, Tensor) else init)[:, 0]
    return rows


@torch.no_grad()
def append_rows(pretrained: nn.Module, new: nn.Module, num_new: int, init: RowInit) -> None:
    """Append more new rows; all new rows become new parameters of ``new``.

    Args:
        pretrained: as in ``first_rows``.
        new: the module of the new rows.
        num_new: number of tokens to add.
        init: as in ``first_rows``.

    Raises:
        ConfigError: if ``num_new`` is not positive, or as ``first_rows``.
        ModelError: as ``first_rows``. In both cases nothing has changed.
    """
    check_num_new(num_new)
    for name, more in first_rows(pretrained, num_new, init).items():
        rows = getattr(new, name)
        setattr(new, name, nn.Parameter(torch.cat([rows, more.to(rows)]), rows.requires_grad))


@torch.no_grad()
def reset_rows(pretrained: nn.Module, new: nn.Module, init: RowInit) -> None:
    """Reset new rows to their first values, in place.

    Args:
        pretrained: as in ``first_rows``.
        new: the module of the new rows.
        init: as in ``first_rows``.

    Raises:
        ConfigError: as ``first_rows``.
        ModelError: as ``first_rows``. In both cases nothing has changed.
    """
    for name, values in first_rows(pretrained, _num_rows(new), init).items():
        getattr(new, name).copy_(values)


@torch.no_grad()
def rows_are_means(pretrained: nn.Module, new: nn.Module) -> bool:
    """Whether every new row is the mean of the pretrained rows; False if one has no memory.

    Args:
        pretrained: as in ``first_rows``.
        new: the module of the new rows.
    """
    if _tables(new)["weight"].is_meta or _tables(pretrained)["weight"].is_meta:
        return False
    means = first_rows(pretrained, _num_rows(new), "mean")
    return all(torch.equal(rows, means[name].to(rows)) for name, rows in _tables(new).items())


@torch.no_grad()
def merged_parameters(pretrained: nn.Module, new: nn.Module) -> dict[str, nn.Parameter]:
    """Return the rows of both modules in one parameter each, the new ones last.

    Args:
        pretrained: as in ``first_rows``.
        new: the module of the new rows.

    Returns:
        ``weight`` and, if there is one, ``bias``, in the pretrained dtype, trainable where either is.
    """
    merged = {}
    for name, old in _tables(pretrained).items():
        rows = getattr(new, name)
        trainable = old.requires_grad or rows.requires_grad
        merged[name] = nn.Parameter(torch.cat([old, rows.to(old.dtype)]), trainable)
    return merged


def _tables(module: nn.Module) -> dict[str, Tensor]:
    found = {name: getattr(module, name, None) for name in ("weight", "bias")}
    return {name: table for name, table in found.items() if table is not None}


def _num_rows(new: nn.Module) -> int:
    return _tables(new)["weight"].shape[0]


def _rows(table: Tensor, num_new: int, init: RowInit) -> Tensor:
    shape = (num_new, table.shape[1])
    if isinstance(init, Tensor):
        if init.shape != shape:
            raise ModelError(f"init must have shape {list(shape)}, got {list(init.shape)}.")
        return init.detach().to(table).clone()
    if init not in ("mean", "normal"):
        raise ConfigError(f'init must be "mean", "normal" or a tensor {list(shape)}, got {init!r}.')
    # In fp32 without an fp32 copy of the table, which may be gigabytes.
    mean = table.mean(dim=0, dtype=torch.float32)
    rows = mean.expand(shape)
    if init == "normal":
        square = torch.linalg.vector_norm(table, dim=0, dtype=torch.float32).square()
        deviation = (square / table.shape[0] - mean.square()).clamp(min=0).sqrt()
        rows = rows + deviation * torch.randn(shape, device=table.device)
    return rows.to(table.dtype).clone()
