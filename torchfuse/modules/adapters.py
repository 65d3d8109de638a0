"""From the encoder's width to the decoder's.

An adapter maps features ``[b, n, d_e]`` to ``[b, n', d]`` and says with ``output_num_tokens(n)`` what
``n'`` will be, so that placeholders can be counted before anything runs. All of its parameters are
fusion parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final, TypeVar

from torch import Tensor, nn

from torchfuse.naming import canonical_name
from torchfuse.options import call_with_options

__all__ = ["Adapter", "LinearAdapter", "MLP2LayerAdapter", "build_adapter", "register_adapter"]

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
_REGISTRY: Final[dict[str, type[Adapter]]] = {}

_AdapterType = TypeVar("_AdapterType", bound="type[Adapter]")


class Adapter(nn.Module, ABC):
    """What maps encoder features to the decoder's width.

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
    """

    name: ClassVar[str | None] = None
    """The name under which ``build_adapter`` knows the class."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if in_dim < 1 or out_dim < 1:
            raise ValueError(f"An adapter needs positive widths, got {in_dim} -> {out_dim}.")
        self.in_dim = in_dim
        self.out_dim = out_dim

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Map features ``[b, n, in_dim]`` to ``[b, output_num_tokens(n), out_dim]``."""

    @abstractmethod
    def output_num_tokens(self, num_tokens: int) -> int:
        """The number of tokens that come out where ``num_tokens`` go in."""

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
            raise ValueError(f"There is an adapter {name!r} already: {_REGISTRY[name].__name__}.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def build_adapter(name: str, in_dim: int, out_dim: int, **options: Any) -> Adapter:
    """Build a registered adapter.

    Args:
        name: ``"linear"``, ``"mlp_2layer"`` or what ``register_adapter`` added.
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        **options: what else the adapter takes.

    Raises:
        ValueError: for an unknown name or option.

    Examples:
        >>> build_adapter("linear", 5, 7).output_num_tokens(11)
        11
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown adapter {name!r}; there are {', '.join(sorted(_REGISTRY))}.")
    return call_with_options(_REGISTRY[name], in_dim, out_dim, what=f"adapter {name!r}", options=options)


@register_adapter("linear")
class LinearAdapter(Adapter):
    """One linear map, token by token.

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        self.linear = nn.Linear(in_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)

    def output_num_tokens(self, num_tokens: int) -> int:
        return num_tokens


@register_adapter("mlp_2layer")
class MLP2LayerAdapter(Adapter):
    """Two linear maps with an activation between them, token by token.

    With ``"gelu"`` this is the projector of LLaVA-1.5 (https://arxiv.org/abs/2310.03744).

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        hidden_dim: width between the two maps; ``out_dim`` unless given.
        activation: ``"gelu"``, ``"silu"`` or ``"relu"``.
        bias: whether both maps have a bias.

    Raises:
        ValueError: for an unknown activation.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
    ) -> None:
        super().__init__(in_dim, out_dim)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}; there are {', '.join(_ACTIVATIONS)}.")
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        self.linear_1 = nn.Linear(in_dim, hidden_dim, bias=bias)
        self.activation = _ACTIVATIONS[activation]()
        self.linear_2 = nn.Linear(hidden_dim, out_dim, bias=bias)

    def options(self) -> dict[str, Any]:
        return {
            "hidden_dim": self.linear_1.out_features,
            "activation": next(n for n, kind in _ACTIVATIONS.items() if type(self.activation) is kind),
            "bias": self.linear_1.bias is not None,
        }

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(features)))

    def output_num_tokens(self, num_tokens: int) -> int:
        return num_tokens
