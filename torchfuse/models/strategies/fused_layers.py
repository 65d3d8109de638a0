"""Choosing the layers to fuse, and exchanging all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from torchfuse.errors import ConfigError, FusionError

__all__ = ["fuse_layers", "layers_to_fuse"]


def layers_to_fuse(
    num_layers: int, layers: Sequence[int] | None, every: int | None, *, default: int = 1
) -> list[int]:
    """Return the indices of the layers to fuse, in order.

    Args:
        num_layers: layers of the decoder.
        layers: the indices that the caller names, counted from 0; None: by ``every``.
        every: layer ``i`` is fused when ``(i + 1) % every == 0``. None: by ``layers``.
        default: ``every``, if neither is given.

    Raises:
        ConfigError: if a named layer does not exist or is named twice, none would be fused, or both are
            given.

    Examples:
        >>> layers_to_fuse(7, None, 3), layers_to_fuse(7, [4, 0], None)
        ([2, 5], [0, 4])
    """
    if layers is not None and every is not None:
        raise ConfigError(
            f"layers={list(layers)} and every={every} both choose the layers to fuse: give one of them."
        )
    if layers is not None:
        indices = sorted(set(layers))
        exist = bool(indices) and indices[0] >= 0 and indices[-1] < num_layers
        if not exist or len(indices) != len(layers):
            raise ConfigError(
                f"layers must name layers of this decoder, 0 to {num_layers - 1}, each once; got "
                f"{list(layers)}."
            )
        return indices
    every = default if every is None else every
    if type(every) is not int or not 1 <= every <= num_layers:
        raise ConfigError(
            f"every={every!r} fuses no layer of this decoder, which has {num_layers}: layer i is "
            f"fused when (i + 1) % every == 0. Choose every between 1 and {num_layers}."
        )
    return list(range(every - 1, num_layers, every))


def fuse_layers(
    layers: Any, indices: Iterable[int], build: Callable[[int], nn.Module]
) -> Callable[[], None]:
    """Build fused layers, and return a function that puts them in place.

    Args:
        layers: the decoder's.
        indices: of the layers to fuse.
        build: builds the fused layer of an index.

    Raises:
        FusionError: of the kind that ``build`` raises, naming the layer.
    """
    fused = {}
    for index in indices:
        try:
            fused[index] = build(index)
        except FusionError as error:
            raise type(error)(f"Layer {index} cannot be fused. {error}") from error

    def put_in_place() -> None:
        for index, layer in fused.items():
            layers[index] = layer

    return put_in_place
