"""What an adapter is, and the registry by which adapters have names.

An adapter maps features ``[b, n, d_e]`` to ``[b, n', d]``, and ``output_num_tokens(n)`` returns ``n'``,
so that placeholders can be counted before anything runs. All of its parameters are
fusion parameters. Those that come with the package are in ``projection`` and ``grid``.
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
    """What maps encoder features to the decoder's width.

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
        """The number of tokens that come out where ``num_tokens`` go in.

        Raises:
            ConfigError: if ``forward`` would not take that many.
        """

    @classmethod
    def options_for(cls, num_tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options that follow from the encoder, where its image has ``num_tokens`` tokens.

        Args:
            num_tokens: features of one image.
            given: the options that the caller has chosen.

        Raises:
            ConfigError: if the adapter does not fit such an encoder.
        """
        return {}

    def options(self) -> dict[str, Any]:
        """What else ``build_adapter`` would need to build this one again."""
        return {}

    def fusion_params(self) -> list[str]:
        """Every parameter of an adapter is a fusion parameter."""
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
        name: ``"linear"``, ``"mlp_2layer"``, ``"avgpool"``, ``"attentional_pool"`` or what
            ``register_adapter`` added.
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        num_tokens: the encoder's features of one image. Adapters with a grid take its side from
            it, unless ``grid`` is given, and then take clips and several images a row.
        **options: what else the adapter takes.

    Raises:
        ConfigError: for an unknown name or option, or ``num_tokens`` that the adapter cannot work on.

    Examples:
        >>> from torchfuse.modules.adapters import build_adapter
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
