"""The base class of adapters, and their registry by name.

An adapter maps features ``[b, n, d_e]`` to ``[b, n', d]``, and ``output_num_tokens(n)`` returns ``n'``,
so that placeholders can be counted before the encoder runs. All of its parameters are fusion
parameters. The adapters of the package are in ``projection`` and ``grid``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, TypeVar

from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.naming import canonical_name
from torchfuse.options import call_with_options

__all__ = ["Adapter", "adapter_names", "build_adapter", "register_adapter"]

_REGISTRY: Final[dict[str, type[Adapter]]] = {}

_AdapterType = TypeVar("_AdapterType", bound="type[Adapter]")


class Adapter(nn.Module, ABC):
    """Base class of adapters, which map encoder features to the decoder's width.

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
    """

    name: ClassVar[str | None] = None
    """The name under which the class is registered."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if in_dim < 1 or out_dim < 1:
            raise ConfigError(f"An adapter needs positive widths, got {in_dim} -> {out_dim}.")
        self.in_dim = in_dim
        self.out_dim = out_dim

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[b, n, in_dim]`` to ``[b, output_num_tokens(n), out_dim]``."""

    @abstractmethod
    def output_num_tokens(self, num_tokens: int) -> int:
        """Return the number of output tokens for a number of input tokens.

        Raises:
            ModelError: if ``forward`` does not accept that many.
        """

    @classmethod
    def options_for(cls, num_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that follow from an encoder with ``num_tokens`` tokens for each image.

        Args:
            num_tokens: features of one image.
            given: the options that the caller has chosen.

        Raises:
            ConfigError: if the adapter, with these options, does not fit such an encoder.
        """
        return {}

    def options(self) -> dict[str, Any]:
        """Return the options with which ``build_adapter`` builds an equal adapter."""
        return {}

    def fusion_params(self) -> list[str]:
        """Return the names of all parameters: every one is a fusion parameter."""
        return [canonical_name(name) for name, _ in self.named_parameters()]


def register_adapter(name: str) -> Callable[[_AdapterType], _AdapterType]:
    """Make an ``Adapter`` class available to ``build_adapter`` and ``fuse`` by name."""

    def register(cls: _AdapterType) -> _AdapterType:
        if name in _REGISTRY:
            raise ConfigError(f"There is an adapter {name!r} already: {_REGISTRY[name].__name__}.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def adapter_names() -> list[str]:
    """Return the names of the registered adapters."""
    return sorted(_REGISTRY)


def build_adapter(
    name: str, in_dim: int, out_dim: int, *, num_tokens: int | None = None, **options: Any
) -> Adapter:
    """Build a registered adapter.

    Args:
        name: ``"linear"``, ``"mlp_2layer"``, ``"avgpool"``, ``"attentional_pool"``, or a name that
            was given to ``register_adapter``.
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        num_tokens: the encoder's number of features of one image, from which adapters with a grid
            compute its side unless ``grid`` is given; rows may be clips or several images then.
        **options: other options of the adapter.

    Raises:
        ConfigError: for an unknown name or option, or ``num_tokens`` that does not fit the adapter.

    Examples:
        >>> from torchfuse.modules.adapters import build_adapter  # registers the package's adapters
        >>> build_adapter("linear", 5, 7).output_num_tokens(11)
        11
        >>> build_adapter("avgpool", 5, 7, num_tokens=9, window=2).output_num_tokens(4 * 9)
        16
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(f"Unknown adapter {name!r}; there are {', '.join(adapter_names())}.")
    adapter = _REGISTRY[name]
    if num_tokens is not None:
        options = {**options, **adapter.options_for(num_tokens, options)}
    return call_with_options(adapter, in_dim, out_dim, what=f"adapter {name!r}", options=options)
