"""Encoders by name, so that a configuration can choose one.

Whatever is built says how wide its features are and how many an image has: lengths are compared with
them before anything runs. Weights are no business of this file: a tower of transformers is built empty
(NaN, so that nobody mistakes it for another) and filled by ``torchfuse.load_pretrained``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from torch import nn

from torchfuse.encoders.stub import RandomEncoder
from torchfuse.errors import ConfigError
from torchfuse.naming import unwrap
from torchfuse.options import call_with_options

__all__ = [
    "build_encoder",
    "encoder_names",
    "encoder_takes",
    "pixels_keyword",
    "register_encoder",
]

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])
_REGISTRY: Final[dict[str, Callable[..., nn.Module]]] = {}
_PIXELS: Final = ("images", "pixel_values")
_SIGLIP: Final = ("siglip_vision_model", "siglip2_vision_model")


def register_encoder(name: str) -> Callable[[_Builder], _Builder]:
    """Make a class or a function that returns an encoder available to ``build_encoder`` by name.

    Raises:
        ConfigError: if there is one of that name.
    """

    def register(builder: _Builder) -> _Builder:
        if name in _REGISTRY:
            raise ConfigError(f"There is an encoder {name!r} already: {_REGISTRY[name].__qualname__}.")
        _REGISTRY[name] = builder
        return builder

    return register


def encoder_names() -> list[str]:
    """The names that ``build_encoder`` knows."""
    return sorted(_REGISTRY)


def build_encoder(name: str, **options: Any) -> nn.Module:
    """Build a registered encoder.

    Args:
        name: ``"clip"`` (a ``ClipVisionEncoder``, by its numbers), ``"hf"`` (the tower that the
            ``config.json`` in a directory describes, ``path=``), ``"siglip2"`` (the same, and nothing
            but a SigLIP or SigLIP 2), ``"random"`` (a ``RandomEncoder``), or what ``register_encoder``
            added.
        **options: what that encoder takes.

    Returns:
        A module with ``feature_dim``, the width of its features, and ``num_tokens``, how many one image
        has (None where that depends on the input).

    Raises:
        ConfigError: for an unknown name or option, or an encoder that does not say its numbers.

    Examples:
        >>> build_encoder("random", num_tokens=5, feature_dim=7).num_tokens
        5
    """
    if name not in _REGISTRY:
        raise ConfigError(f"Unknown encoder {name!r}; there are {', '.join(encoder_names())}.")
    what = f"encoder {name!r}"
    encoder = call_with_options(_REGISTRY[name], what=what, options=options)
    problems = []
    for attribute in ("feature_dim", "num_tokens"):
        value = getattr(encoder, attribute, "nothing")
        unknown = attribute == "num_tokens" and value is None
        if not unknown and (type(value) is not int or value < 1):
            problems.append(f"{attribute} must be an integer of at least 1, it is {value!r}")
    if problems or not isinstance(encoder, nn.Module):
        problems = problems or ["it must be an nn.Module"]
        raise ConfigError(
            f"{what}, a {type(encoder).__name__}, must say what its features are: {'; '.join(problems)} "
            "(num_tokens may be None where it depends on the input)."
        )
    return encoder


def encoder_takes(name: str, option: str) -> bool:
    """Whether a registered encoder has an option of its own by this name."""
    return name in _REGISTRY and option in inspect.signature(_REGISTRY[name]).parameters


def pixels_keyword(encoder: nn.Module) -> str:
    """The keyword by which an encoder takes pixels.

    ``images`` or ``pixel_values`` if its ``forward`` names one of them, else the first that it names;
    where it names none, its ``example_input()`` is asked.

    Args:
        encoder: any encoder.

    Raises:
        ConfigError: if there is no telling.

    Examples:
        >>> pixels_keyword(RandomEncoder(5, 7)), pixels_keyword(nn.Linear(3, 5))
        ('images', 'input')
    """
    inner: Any = unwrap(encoder)
    parameters = inspect.signature(inner.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not names and callable(getattr(inner, "example_input", None)):
        names = [name for name in inner.example_input() if name in _PIXELS]
    found = next((name for name in _PIXELS if name in names), next(iter(names), None))
    if found is None:
        raise ConfigError(
            f"Which keyword of {type(inner).__name__} takes pixels is not known: let its forward name "
            f"{' or '.join(_PIXELS)}."
        )
    return found


register_encoder("random")(RandomEncoder)


@register_encoder("clip")
def _clip(**options: Any) -> nn.Module:
    from torchfuse.encoders.clip import ClipVisionEncoder  # imports torchtune

    return call_with_options(ClipVisionEncoder, what="encoder 'clip'", options=options)


@register_encoder("hf")
def _hf(
    path: str | Path,
    feature_layer: int | None = None,
    keep_cls: bool | None = None,
    image_size: int | None = None,
    num_special_tokens: int | None = None,
) -> nn.Module:
    from torchfuse.encoders.hf_build import hf_encoder  # imports transformers

    return hf_encoder(
        path,
        feature_layer=feature_layer,
        keep_cls=keep_cls,
        image_size=image_size,
        num_special_tokens=num_special_tokens,
    )


@register_encoder("siglip2")
def _siglip2(
    path: str | Path, feature_layer: int | None = None, image_size: int | None = None
) -> nn.Module:
    from torchfuse.encoders.hf_build import hf_encoder, tower_config  # imports transformers

    # Checkpoints of SigLIP 2 with images of one size call themselves SigLIP: the tower is the same.
    config = tower_config(path)
    if config.model_type not in _SIGLIP:
        raise ConfigError(
            f"encoder 'siglip2': {path} holds a {config.model_type!r}, and must hold one of "
            f"{', '.join(_SIGLIP)}. The encoder 'hf' takes any tower."
        )
    return hf_encoder(config, feature_layer=feature_layer, image_size=image_size)
