import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfuse import get_fusion_params
from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.adapters import (
    Adapter,
    AttentionalPoolAdapter,
    AvgPoolAdapter,
    LinearAdapter,
    MLP2LayerAdapter,
    build_adapter,
    register_adapter,
)
from torchfuse.modules.adapters import base as adapter_base
from torchfuse.modules.adapters.base import adapter_names

B, N, IN, OUT = 2, 5, 7, 11
HEADS, WIDE = 3, 6  # a width that heads divide

POOLS = {
    "avgpool": {"window": 2},
    "attentional_pool": {"window": 2, "num_heads": HEADS},
}


@pytest.mark.parametrize("name", ["linear", "mlp_2layer"])
def test_forward_matches_output_num_tokens(name):
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
    with pytest.raises(
        ConfigError, match="Unknown adapter 'mlp'; there are .*avgpool, .*linear, mlp_2layer"
    ):
        build_adapter("mlp", IN, OUT)
    with pytest.raises(ConfigError, match="adapter 'linear': unknown option 'bias'; it takes none"):
        build_adapter("linear", IN, OUT, bias=True)
    with pytest.raises(ConfigError, match="Unknown activation 'tanh'; there are gelu, silu, relu"):
        build_adapter("mlp_2layer", IN, OUT, activation="tanh")
    with pytest.raises(ConfigError, match=r"Unknown adapter \['linear'\]; there are "):
        build_adapter(["linear"], IN, OUT)
    for name in adapter_names():
        for widths in ((0, OUT), (IN, 0), (-1, OUT), (IN, -1)):
            with pytest.raises(ConfigError, match=f"positive widths, got {widths[0]} -> {widths[1]}"):
                build_adapter(name, *widths)


def test_a_new_adapter_takes_one_class_and_one_decorator(monkeypatch):
    monkeypatch.setattr(adapter_base, "_REGISTRY", dict(adapter_base._REGISTRY))

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
    with pytest.raises(ConfigError, match="There is an adapter 'halve' already: Halve"):
        register_adapter("halve")(Halve)


def pool(name, in_dim=WIDE, **options):
    torch.manual_seed(3)
    return build_adapter(name, in_dim, OUT, **POOLS[name] | options)


def windows_of(x, window):
    """The real cells of every window of a grid ``[b, g, g, d]``, by the definition."""
    side = x.shape[1]
    starts = range(0, side, window)
    return [x[:, i : i + window, j : j + window].flatten(1, 2) for i in starts for j in starts]


def outcome(function, *args):
    """What a function returns, and what it complains of."""
    try:
        return function(*args), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("side", [1, 4, 5])
def test_avgpool_averages_the_real_cells_of_every_window(side, window):
    adapter = AvgPoolAdapter(IN, OUT, window=window).double()
    x = torch.randn(B, side * side, IN, dtype=torch.float64)
    cells = x.view(B, side, side, IN)
    pooled = torch.stack([w.mean(dim=1) for w in windows_of(cells, window)], dim=1)
    expected = pooled @ adapter.linear.weight.T + adapter.linear.bias
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)
    assert expected.shape[1] == adapter.output_num_tokens(side * side) == math.ceil(side / window) ** 2
    # as torch's own pooling counts, which must not count what lies beyond the edge
    torchs = F.avg_pool2d(cells.movedim(-1, 1), window, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(pooled, torchs.flatten(2).mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_attentional_pool_is_multi_head_attention_in_every_window(window):
    side = 6
    adapter = AttentionalPoolAdapter(WIDE, OUT, window=window, num_heads=HEADS).double()
    x = torch.randn(B, side * side, WIDE, dtype=torch.float64)
    attention = adapter.attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    torch_attention = nn.MultiheadAttention(WIDE, HEADS, batch_first=True, dtype=torch.float64)
    torch_attention.load_state_dict(
        {
            "in_proj_weight": torch.cat([p.weight for p in projections]),
            "in_proj_bias": torch.cat([p.bias for p in projections]),
            "out_proj.weight": attention.output_proj.weight,
            "out_proj.bias": attention.output_proj.bias,
        }
    )
    out = [
        torch_attention(cells.mean(dim=1, keepdim=True), cells, cells, need_weights=False)[0]
        for cells in windows_of(x.view(B, side, side, WIDE), window)
    ]
    expected = adapter.linear(torch.cat(out, dim=1))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)
    # and as the equation says
    by_head = (B, side * side, HEADS, WIDE // HEADS)
    k, v = (p(x).view(by_head) for p in (attention.k_proj, attention.v_proj))
    index = torch.arange(side * side).view(1, side, side, 1)
    for m, cells in enumerate(windows_of(index, window)):
        at = cells.flatten()
        q = attention.q_proj(x[:, at].mean(dim=1)).view(B, HEADS, -1)
        scores = torch.einsum("bhe,bche->bhc", q, k[:, at])
        weights = (scores / math.sqrt(WIDE // HEADS)).softmax(-1)
        one = torch.einsum("bhc,bche->bhe", weights, v[:, at]).flatten(1)
        torch.testing.assert_close(
            adapter(x)[:, m], adapter.linear(attention.output_proj(one)), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("keep_prefix", [True, False], ids=["kept", "dropped"])
def test_gradients_are_right(name, keep_prefix):
    adapter = pool(name, grid=2, num_prefix_tokens=1, keep_prefix=keep_prefix).double()
    x = torch.randn(1, 2 * 5, WIDE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(adapter, (x,))
    adapter(x).sum().backward()
    # A query that is the mean of one value gives no gradient to what only shifts all scores alike.
    silent = {n for n, p in adapter.named_parameters() if not p.grad.any()}
    assert silent <= {"attention.k_proj.bias"}
    assert x.grad.view(2, 5, WIDE)[:, 1:].any(dim=-1).all()
    assert bool(x.grad.view(2, 5, WIDE)[:, 0].any()) == keep_prefix


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_prefix_tokens": 1},
        {"num_prefix_tokens": 3, "keep_prefix": False},
        {"grid": 4},
        {"grid": 4, "num_prefix_tokens": 2},
        {"grid": 4, "num_prefix_tokens": 2, "keep_prefix": False},
        {"grid": 3, "window": 3},
    ],
    ids=str,
)
def test_what_is_announced_comes_out_for_every_number_of_tokens(name, options):
    adapter, taken = pool(name, **options), []
    for n in range(1, 75):
        x = torch.randn(1, n, WIDE)
        announced, refusal = outcome(adapter.output_num_tokens, n)
        out, complaint = outcome(adapter, x)
        assert complaint == refusal
        if refusal is None:
            assert out.shape == (1, announced, OUT)
            taken.append(n)
        else:
            assert f"{n} tokens" in refusal
    front, even = options.get("num_prefix_tokens", 0), name == "attentional_pool"
    if side := options.get("grid"):
        assert taken == list(range(front + side**2, 75, front + side**2))
    else:
        sides = [g for g in range(1, 9) if not (even and g % 2)]
        assert taken == [front + g * g for g in sides if front + g * g < 75]


@pytest.mark.parametrize("name", POOLS)
def test_frames_are_pooled_each_by_itself(name):
    adapter = pool(name, grid=4, num_prefix_tokens=1).double()
    frames = torch.randn(B, 3, 17, WIDE, dtype=torch.float64)
    out = adapter(frames.flatten(1, 2)).unflatten(1, (3, -1))
    for frame in range(3):
        torch.testing.assert_close(out[:, frame], adapter(frames[:, frame]), rtol=1e-12, atol=1e-12)
    # Four frames of 4 x 4 are no image of 8 x 8.
    four, large = pool(name, grid=4), pool(name)
    x = torch.randn(B, 64, WIDE)
    assert four(x).shape == large(x).shape == (B, 16, OUT)
    assert not torch.allclose(four(x), large(x))


@pytest.mark.parametrize("name", POOLS)
def test_tokens_in_front_pass_by_or_are_dropped(name):
    x = torch.randn(B, 2 + 16, WIDE)
    kept, dropped = (pool(name, num_prefix_tokens=2, keep_prefix=keep) for keep in (True, False))
    grid = pool(name)(x[:, 2:])
    torch.testing.assert_close(kept(x), torch.cat([kept.linear(x[:, :2]), grid], dim=1))
    torch.testing.assert_close(dropped(x), grid)


def test_the_encoders_number_of_tokens_gives_the_grid():
    adapter = build_adapter("avgpool", IN, OUT, num_tokens=26, num_prefix_tokens=1, window=3)
    assert adapter.options()["grid"] == 5
    assert adapter.output_num_tokens(4 * 26) == 4 * (1 + 4)
    assert build_adapter("avgpool", IN, OUT, num_tokens=25, grid=3).options()["grid"] == 3
    assert build_adapter("avgpool", IN, OUT, num_tokens=25, grid=None).options()["grid"] == 5
    assert build_adapter("linear", IN, OUT, num_tokens=26).options() == {}
    with pytest.raises(
        ConfigError, match="avgpool: for the encoder's image, 26 tokens are no square grid"
    ):
        build_adapter("avgpool", IN, OUT, num_tokens=26)
    with pytest.raises(ConfigError, match="num_prefix_tokens must be an integer, got 'two'"):
        build_adapter("avgpool", IN, OUT, num_tokens=26, num_prefix_tokens="two")
    with pytest.raises(ConfigError, match="window=2 must divide the side 5 of the grid"):
        build_adapter("attentional_pool", IN, OUT, num_tokens=25, num_heads=7)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("mlp_2layer", {"hidden_dim": 13, "activation": "silu", "bias": False}),
        ("avgpool", {"window": 3, "grid": 6, "num_prefix_tokens": 2, "keep_prefix": False}),
        ("avgpool", {}),
        ("attentional_pool", {"window": 3, "num_heads": 2, "grid": 6, "num_prefix_tokens": 1}),
    ],
    ids=str,
)
def test_options_build_the_same_adapter_again(name, options):
    adapter = build_adapter(name, WIDE, OUT, **options)
    said = adapter.options()
    assert options.items() <= said.items()
    again = build_adapter(adapter.name, adapter.in_dim, adapter.out_dim, **said)
    assert again.options() == said
    again.load_state_dict(adapter.state_dict())
    n = 2 * 38 if "grid" in options else 16
    if name == "attentional_pool":
        n = 2 * 37
    x = torch.randn(B, n, WIDE)
    assert torch.equal(again(x), adapter(x))


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("mlp_2layer", {"hidden_dim": 0}, "mlp_2layer: hidden_dim=0 must be at least 1"),
        ("mlp_2layer", {"hidden_dim": -1}, "mlp_2layer: hidden_dim=-1 must be at least 1"),
        ("attentional_pool", {"window": -1}, "attentional_pool: window=-1 must be at least 1"),
        ("attentional_pool", {"num_heads": -3}, "num_heads=-3 must divide the width 6"),
        ("avgpool", {"window": 0}, "avgpool: window=0 must be at least 1"),
        ("avgpool", {"grid": 0, "num_prefix_tokens": -1}, "grid=0 must .*; num_prefix_tokens=-1 must"),
        ("attentional_pool", {"window": 2, "grid": 5}, "window=2 must divide the side 5"),
        ("attentional_pool", {"num_heads": 4}, "num_heads=4 must divide the width 6"),
        ("attentional_pool", {"num_heads": 0}, "num_heads=0 must divide the width 6"),
        ("avgpool", {"num_heads": 3}, "unknown option 'num_heads'; it takes window, grid,"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_named(name, options, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build_adapter(name, WIDE, OUT, **options)


@pytest.mark.parametrize(
    ("options", "num", "complaint"),
    [
        ({}, 577, r"577 tokens are no square grid: 24 x 24 = 576 .* With num_prefix_tokens=1 "),
        ({}, 60, r"60 tokens are no square grid: 7 x 7 = 49 would be one.*give .* as grid=\.$"),
        ({"num_prefix_tokens": 1}, 576, r"576 tokens .* after 1 others: 1 \+ 23 x 23 = 530"),
        ({"num_prefix_tokens": 1}, 576, r"With num_prefix_tokens=0"),
        ({"grid": 5}, 4 * 26, r"104 tokens are no frames of 5 x 5 = 25 .* With num_prefix_tokens=1 "),
        ({"grid": 5, "num_prefix_tokens": 1}, 25, r"25 tokens are no frames of 1 \+ 5 x 5 = 26"),
        ({"num_prefix_tokens": 1}, 1, r"1 tokens are no square grid after 1 others: 1 \+ 1 x 1 = 2"),
        ({}, 0, "0 tokens are no square grid"),
        ({"grid": 5}, 0, "0 tokens are no frames"),
    ],
    ids=str,
)
def test_tokens_that_are_no_grid_are_named(options, num, complaint):
    adapter = AvgPoolAdapter(IN, OUT, **options)
    with pytest.raises(ModelError, match=f"avgpool: {complaint}" if complaint[0] != "W" else complaint):
        adapter.output_num_tokens(num)


@pytest.mark.parametrize("name", POOLS)
def test_one_graph_and_low_precision(name):
    adapter = pool(name, grid=4)
    x = torch.randn(B, 48, WIDE)
    compiled = torch.compile(adapter, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapter(x))
    half = adapter(x).bfloat16()
    out = adapter.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, half, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", POOLS)
def test_all_of_a_pool_is_fusions(name):
    adapter = pool(name)
    assert adapter.fusion_params() == [n for n, _ in adapter.named_parameters()]
    assert len(adapter.fusion_params()) == {"avgpool": 2, "attentional_pool": 10}[name]
