"""Adapters that project token by token: one linear map, or two with an activation between them."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.modules.adapters.base import Adapter, register_adapter

__all__ = ["LinearAdapter", "MLP2LayerAdapter"]

_ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


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

    With ``"gelu"`` this is the projector of LLaVA-1.5 (https://arxiv.org/abs/2310.03744). A class token
    or registers that an encoder leaves in front of its patches are tokens as any other here; LLaVA drops
    the class token at the encoder (``keep_cls=False``).

    Args:
        in_dim: width of the encoder's features.
        out_dim: width of the decoder.
        hidden_dim: width between the two maps; ``out_dim`` unless given.
        activation: ``"gelu"``, ``"silu"`` or ``"relu"``.
        bias: whether both maps have a bias.

    Raises:
        ConfigError: for an unknown activation, or a width below 1.
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
            raise ConfigError(f"Unknown activation {activation!r}; there are {', '.join(_ACTIVATIONS)}.")
        hidden_dim = out_dim if hidden_dim is None else hidden_dim
        if hidden_dim < 1:
            raise ConfigError(f"{self.name}: hidden_dim={hidden_dim} must be at least 1.")
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
