"""Encoders by name, so that a configuration can choose one.

Every encoder that is built here has a width and a number of features, with which lengths are compared
before anything runs. A tower of transformers is built without weights (all parameters are NaN);
``torchfuse.load_pretrained`` loads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from torch import nn

from torchfuse.encoders.stub import RandomEncoder
from torchfuse.errors import ConfigError, ModelError
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
    """Register a class, or a function that returns an encoder, for ``build_encoder``.

    Raises:
        ConfigError: if the name is taken.
    """

    def register(builder: _Builder) -> _Builder:
        if name in _REGISTRY:
            raise ConfigError(f"There is an encoder {name!r} already: {_REGISTRY[name].__qualname__}.")
        _REGISTRY[name] = builder
        return builder

    return register


def encoder_names() -> list[str]:
    """Return the registered names."""
    return sorted(_REGISTRY)


def build_encoder(name: str, **options: Any) -> nn.Module:
    """Build a registered encoder.

    Args:
        name: ``"clip"`` (a ``ClipVisionEncoder``, from its numbers), ``"hf"`` (the tower that the
            ``config.json`` in a directory describes, ``path=``, see ``HfEncoder``), ``"siglip2"`` (the
            same for SigLIP and SigLIP 2 only), ``"random"`` (a ``RandomEncoder``), or a name of
            ``register_encoder``.
        **options: the encoder's options.

    Returns:
        A module with ``feature_dim``, the width of its features, and ``num_tokens``, the number of
        features of one image (None where that depends on the input).

    Raises:
        ConfigError: for an unknown name or option, or an encoder without these two attributes.

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
        value = getattr(encoder, attribute, "missing")
        optional = attribute == "num_tokens" and value is None
        if not optional and (type(value) is not int or value < 1):
            problems.append(f"{attribute} must be an integer of at least 1, it is {value!r}")
    if problems or not isinstance(encoder, nn.Module):
        problems = problems or ["it must be an nn.Module"]
        raise ConfigError(
            f"{what}, a {type(encoder).__name__}, must state the size of its features: "
            f"{'; '.join(problems)} (num_tokens may be None where it depends on the input)."
        )
    return encoder


def encoder_takes(name: str, option: str) -> bool:
    """Return whether a registered encoder has an option of this name."""
    return name in _REGISTRY and option in inspect.signature(_REGISTRY[name]).parameters


def pixels_keyword(encoder: nn.Module) -> str:
    """Return the keyword by which an encoder takes pixels.

    ``images`` or ``pixel_values`` if its ``forward`` or, where that has no named parameters, its
    ``example_input()`` has one of them; else the first parameter of ``forward``.

    Args:
        encoder: any encoder.

    Raises:
        ModelError: if there is none of these.

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
        raise ModelError(
            f"Which keyword of {type(inner).__name__} takes pixels is not known: its forward must "
            f"have a parameter {' or '.join(_PIXELS)}."
        )
    return found


register_encoder("random")(RandomEncoder)


@register_encoder("clip")
def _clip(**options: Any) -> nn.Module:
    from torchfuse.encoders.clip import ClipVisionEncoder  # imports torchtune

    return call_with_options(ClipVisionEncoder, what="encoder 'clip'", options=options)


@register_encoder("hf")
def _hf(path: str | Path, **options: Any) -> nn.Module:
    from torchfuse.encoders.hf_build import hf_encoder  # imports transformers

    return call_with_options(hf_encoder, path, what="encoder 'hf'", options=options)


@register_encoder("siglip2")
def _siglip2(path: str | Path, **options: Any) -> nn.Module:
    from torchfuse.encoders.hf_build import hf_encoder, tower_config  # imports transformers

    # Checkpoints of SigLIP 2 with images of one size have SigLIP's model_type: the tower is the same.
    config = tower_config(path)
    if config.model_type not in _SIGLIP:
        raise ConfigError(
            f"encoder 'siglip2': {path} holds a {config.model_type!r}, and must hold one of "
            f"{', '.join(_SIGLIP)}. The encoder 'hf' takes any tower."
        )
    return call_with_options(hf_encoder, config, what="encoder 'siglip2'", options=options)
