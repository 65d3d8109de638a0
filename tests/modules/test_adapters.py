import pytest
import torch
from torch import nn

from torchfuse import get_fusion_params
from torchfuse.modules import adapters
from torchfuse.modules.adapters import (
    Adapter,
    LinearAdapter,
    MLP2LayerAdapter,
    build_adapter,
    register_adapter,
)

B, N, IN, OUT = 2, 5, 7, 11


@pytest.mark.parametrize("name", ["linear", "mlp_2layer"])
def test_says_what_comes_out(name):
    adapter = build_adapter(name, IN, OUT)
    out = adapter(torch.randn(B, N, IN))
    assert out.shape == (B, adapter.output_num_tokens(N), OUT)


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", nn.functional.gelu), ("silu", nn.functional.silu), ("relu", torch.relu)],
)
def test_two_layers_as_the_equations_say(activation, function):
    adapter = MLP2LayerAdapter(IN, OUT, hidden_dim=13, activation=activation)
    x = torch.randn(B, N, IN)
    hidden = function(x @ adapter.linear_1.weight.T + adapter.linear_1.bias)
    assert hidden.shape[-1] == 13
    expected = hidden @ adapter.linear_2.weight.T + adapter.linear_2.bias
    torch.testing.assert_close(adapter(x), expected)
    assert MLP2LayerAdapter(IN, OUT).linear_1.out_features == OUT


def test_every_parameter_is_a_fusion_parameter():
    model = nn.Sequential(nn.Linear(IN, IN), LinearAdapter(IN, OUT))
    assert list(get_fusion_params(model)) == ["1.linear.weight", "1.linear.bias"]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="Unknown adapter 'mlp'; there are linear, mlp_2layer"):
        build_adapter("mlp", IN, OUT)
    with pytest.raises(ValueError, match="adapter 'linear': unknown option 'bias'; it takes none"):
        build_adapter("linear", IN, OUT, bias=True)
    with pytest.raises(ValueError, match="Unknown activation 'tanh'; there are gelu, silu, relu"):
        build_adapter("mlp_2layer", IN, OUT, activation="tanh")
    with pytest.raises(ValueError, match="positive widths, got 0 -> 11"):
        build_adapter("linear", 0, OUT)


def test_a_new_adapter_takes_one_class_and_one_decorator(monkeypatch):
    monkeypatch.setattr(adapters, "_REGISTRY", dict(adapters._REGISTRY))

    @register_adapter("halve")
    class Halve(Adapter):
        def __init__(self, in_dim, out_dim):
            super().__init__(in_dim, out_dim)
            self.map = nn.Linear(2 * in_dim, out_dim)

        def forward(self, features):
            return self.map(features.unflatten(1, (-1, 2)).flatten(2))

        def output_num_tokens(self, num_tokens):
            return num_tokens // 2

    adapter = build_adapter("halve", IN, OUT)
    assert adapter(torch.randn(B, 6, IN)).shape == (B, 3, OUT)
    assert adapter.fusion_params() == ["map.weight", "map.bias"]
    with pytest.raises(ValueError, match="There is an adapter 'halve' already: Halve"):
        register_adapter("halve")(Halve)
