"""What determines the result of a transform, as JSON values to compare."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["describe_settings", "list_differences"]


def describe_settings(value: Any, _within: tuple[int, ...] = ()) -> Any:
    """Return what determines the result of a transform: names of classes and functions, and attributes.

    Attributes are followed into objects and containers. Of arrays and tensors there is a hash. The code
    of functions is not compared.

    Examples:
        >>> from torchfuse.data import ImageTransform
        >>> settings = describe_settings(ImageTransform(8))
        >>> settings["class"], settings["height"], settings["resample"]
        ('torchfuse.data.images.transform.ImageTransform', 8, 'bicubic')
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in _within:
        return "itself"
    inside = functools.partial(describe_settings, _within=(*_within, id(value)))
    if isinstance(value, Mapping):
        return {str(key).lstrip("_"): inside(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inside(item) for item in value]
    if isinstance(value, np.ndarray | Tensor):
        array = value.detach().cpu().to(torch.float64).numpy() if isinstance(value, Tensor) else value
        return f"{list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, functools.partial):
        return {
            "class": "partial",
            **inside(dict(function=value.func, args=value.args, **value.keywords)),
        }
    if isinstance(value, MethodType):
        return {"method": value.__name__, "of": inside(value.__self__)}
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return f"{value.__module__}.{value.__qualname__}"
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if hasattr(value, "__dict__"):
        return {"class": name, **inside(vars(value))}
    text = repr(value)
    return name if " at 0x" in text else text


def list_differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs, by its dotted name."""
    was, now = dict(_flatten(saved)), dict(_flatten(own))
    return [
        f"{key} was {was.get(key, 'not there')}, and is {now.get(key, 'not there')}"
        for key in dict.fromkeys([*was, *now])
        if was.get(key, _flatten) != now.get(key, _flatten)
    ]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}.{key}" if name else key)
    else:
        yield name, value
