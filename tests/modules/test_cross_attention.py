import math

import pytest
import torch
from support import BACKENDS
from torch import nn
from torchtune.modules import MultiHeadAttention, RMSNorm, TransformerCrossAttentionLayer

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.layers import cross_attention_layer
from torchfuse.modules.cross_attention import CrossAttention, GatedCrossAttentionLayer

B, S, N, D = 2, 5, 7, 12
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 6, 3, 2, 17


def make(gate=0.6, **changes):
    numbers = {
        "embed_dim": D,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_dim": HIDDEN,
    }
    layer = cross_attention_layer(**numbers | changes)
    with torch.no_grad():
        layer.ca_scale.scale.fill_(gate)
        layer.mlp_scale.scale.fill_(-gate)
        for name, p in layer.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    return layer


def data(dtype=torch.float32):
    return torch.randn(B, S, D, dtype=dtype), torch.randn(B, N, D, dtype=dtype)


def einsum_reference(layer, x, features, mask):
    """The layer as the equations say it, a head at a time."""

    def rms(values, norm):
        return values / (values.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.scale

    attn = layer.attn
    h = rms(x, layer.ca_norm)
    q = rms((h @ attn.q_proj.weight.T).reshape(B, S, HEADS, HEAD_DIM), attn.q_norm)
    k = rms((features @ attn.k_proj.weight.T).reshape(B, N, KV_HEADS, HEAD_DIM), attn.k_norm)
    v = (features @ attn.v_proj.weight.T).reshape(B, N, KV_HEADS, HEAD_DIM)
    heads = []
    for i in range(HEADS):
        shared = i // (HEADS // KV_HEADS)
        scores = torch.einsum("bsd,bnd->bsn", q[:, :, i], k[:, :, shared]) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        heads.append(torch.einsum("bsn,bnd->bsd", weights, v[:, :, shared]))
    x = x + layer.ca_scale.scale.tanh() * (torch.cat(heads, -1) @ attn.output_proj.weight.T)
    h = rms(x, layer.mlp_norm)
    inner = torch.nn.functional.silu(h @ layer.mlp.w1.weight.T) * (h @ layer.mlp.w3.weight.T)
    return x + layer.mlp_scale.scale.tanh() * (inner @ layer.mlp.w2.weight.T)


def test_equals_the_equations_in_float64(monkeypatch):
    # torchtune's norm always computes in fp32; here it shall not.
    monkeypatch.setattr(
        RMSNorm,
        "forward",
        lambda self, x: nn.functional.rms_norm(x, self.normalized_shape, self.scale, self.eps),
    )
    layer = make().double()
    x, features = data(torch.float64)
    mask = torch.rand(B, S, N) < 0.6
    mask[..., 0] = True
    expected = einsum_reference(layer, x, features, mask)
    torch.testing.assert_close(
        layer(x, encoder_input=features, encoder_mask=mask), expected, rtol=0, atol=1e-12
    )


def torchtune_twin(layer):
    """torchtune's own layer with the same weights."""
    linear = nn.Linear
    attn = MultiHeadAttention(
        embed_dim=D,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=linear(D, HEADS * HEAD_DIM, bias=False),
        k_proj=linear(D, KV_HEADS * HEAD_DIM, bias=False),
        v_proj=linear(D, KV_HEADS * HEAD_DIM, bias=False),
        output_proj=linear(HEADS * HEAD_DIM, D, bias=False),
        q_norm=RMSNorm(HEAD_DIM, eps=1e-5),
        k_norm=RMSNorm(HEAD_DIM, eps=1e-5),
        is_causal=False,
    )
    twin = make()
    torchtunes = TransformerCrossAttentionLayer(
        attn=attn,
        mlp=twin.mlp,
        ca_norm=twin.ca_norm,
        mlp_norm=twin.mlp_norm,
        ca_scale=twin.ca_scale,
        mlp_scale=twin.mlp_scale,
    )
    torchtunes.load_state_dict(layer.state_dict())  # the same names
    return torchtunes


@pytest.mark.parametrize("masked", [False, True])
def test_equals_torchtunes_layer(masked):
    layer = make()
    torchtunes = torchtune_twin(layer)
    x, features = data()
    mask = torch.rand(B, S, N) < 0.5 if masked else None
    if masked:
        mask[0, 2] = False
    out = layer(x, encoder_input=features, encoder_mask=mask)
    expected = torchtunes(x, encoder_input=features, encoder_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_zero_gates_are_the_identity_to_the_bit():
    layer = cross_attention_layer(
        embed_dim=D, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, hidden_dim=HIDDEN
    )
    x, features = data()
    assert torch.equal(layer(x, encoder_input=features), x)
    assert not torch.equal(make()(x, encoder_input=features), x)


def test_without_features_nothing_happens():
    x, _ = data()
    assert make()(x, encoder_input=None, encoder_mask=torch.ones(B, S, N, dtype=torch.bool)) is x


def test_a_fully_masked_row_is_unchanged_with_finite_gradients():
    layer = make()
    x, features = (t.requires_grad_() for t in data())
    mask = torch.rand(B, S, N) < 0.5
    mask[..., 0] = True
    mask[0, 1] = mask[1] = False
    out = layer(x, encoder_input=features, encoder_mask=mask)
    assert torch.equal(out[0, 1], x[0, 1])
    assert torch.equal(out[1], x[1])
    assert not torch.equal(out[0, 0], x[0, 0])
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, features, *layer.parameters()])
    assert not features.grad[1].any()
    assert torch.equal(x.grad[1], 2 * x[1])


def test_a_fully_masked_batch_has_zero_gradients_for_every_weight():
    layer = make()
    x, features = data()
    mask = torch.zeros(B, S, N, dtype=torch.bool)
    out = layer(x.requires_grad_(), encoder_input=features, encoder_mask=mask)
    assert torch.equal(out, x)
    out.sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_masking_a_feature_equals_deleting_it():
    layer = make()
    x, features = data()
    mask = torch.ones(B, S, N, dtype=torch.bool)
    mask[..., [1, 4]] = False
    kept = features[:, [0, 2, 3, 5, 6]]
    torch.testing.assert_close(
        layer(x, encoder_input=features, encoder_mask=mask),
        layer(x, encoder_input=kept),
        rtol=1e-5,
        atol=1e-6,
    )


def test_not_causal_along_features_and_positions_do_not_matter():
    layer = make()
    x, features = data()
    order = torch.randperm(N)
    torch.testing.assert_close(
        layer(x, encoder_input=features),
        layer(x, encoder_input=features[:, order]),
        rtol=1e-5,
        atol=1e-6,
    )
    moved = features.clone()
    moved[:, -1] += 1
    assert not torch.allclose(
        layer(x, encoder_input=features)[:, 0], layer(x, encoder_input=moved)[:, 0]
    )


def cached(layer, slots):
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=slots, decoder_max_seq_len=None)
    return layer.eval()


@pytest.mark.parametrize("slots", [N, N + 4])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_features_equal_features_given_again(slots, masked):
    plain, layer = make().eval(), make()
    layer.load_state_dict(plain.state_dict())
    cached(layer, slots)
    assert layer.caches_are_setup()
    assert layer.caches_are_enabled()
    x, features = data()
    mask = torch.rand(B, S, N) < 0.5 if masked else None
    if masked:
        mask[1, 3] = False
    with torch.no_grad():
        expected = plain(x, encoder_input=features, encoder_mask=mask)
        first = layer(x, encoder_input=features, encoder_mask=mask)
        again = layer(x, encoder_mask=mask)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, first)


def test_an_empty_or_reset_cache_is_not_attended_to_and_refills():
    layer = cached(make(), N)
    x, features = data()
    with torch.no_grad():
        assert layer(x) is x
        first = layer(x, encoder_input=features)
        layer.reset_cache()
        assert layer(x) is x
        shorter = layer(x, encoder_input=features[:, :3])
        plain = make()
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(
            shorter, plain(x, encoder_input=features[:, :3]), rtol=1e-5, atol=1e-6
        )
        assert not torch.allclose(first, shorter)


def test_caches_are_in_no_state_dict():
    layer = make()
    keys = list(layer.state_dict())
    cached(layer, N)
    assert list(layer.state_dict()) == keys


def test_a_cache_that_is_too_small_is_an_error_that_leaves_it_alone():
    layer = cached(make(), N)
    x, features = data()
    with torch.no_grad():
        first = layer(x, encoder_input=features)
        with pytest.raises(ModelError, match=rf"up to {N} encoder tokens, got {B} rows of {N + 1}"):
            layer(x, encoder_input=torch.randn(B, N + 1, D))
        with pytest.raises(ModelError, match="holds 2 rows"):
            layer(x[:1], encoder_input=features[:1])
        assert torch.equal(layer(x), first)


def test_set_up_needs_a_length_and_reset_needs_a_cache():
    with pytest.raises(ModelError, match="needs encoder_max_seq_len"):
        make().setup_caches(B, torch.float32, encoder_max_seq_len=None)
    with pytest.raises(RuntimeError, match="call setup_caches first"):
        make().reset_cache()


def test_setting_up_twice_keeps_the_first_cache(caplog):
    layer = cached(make(), N)
    first = layer.attn.kv_cache
    cached(layer, N + 5)
    assert layer.attn.kv_cache is first
    assert "set up already" in caplog.text


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, S, N),
        torch.ones(B, S, N + 1, dtype=torch.bool),
        torch.ones(B, S + 1, N, dtype=torch.bool),
        torch.ones(B + 1, S, N, dtype=torch.bool),
        torch.ones(B, N, dtype=torch.bool),
    ],
)
def test_a_mask_of_another_kind_is_refused(mask):
    x, features = data()
    with pytest.raises(ModelError, match="encoder_mask must"):
        make()(x, encoder_input=features, encoder_mask=mask)


def test_attention_alone():
    attn = make().attn
    x, y = data()
    with pytest.raises(ModelError, match="nothing to attend to"):
        attn(x)
    with pytest.raises(ConfigError, match="num_kv_heads must divide num_heads, got 2 and 3"):
        CrossAttention(
            num_heads=3,
            num_kv_heads=2,
            head_dim=1,
            q_proj=nn.Identity(),
            k_proj=nn.Identity(),
            v_proj=nn.Identity(),
            output_proj=nn.Identity(),
        )
    with pytest.raises(ModelError, match="together or not at all"):
        CrossAttention(
            num_heads=3,
            num_kv_heads=1,
            head_dim=1,
            q_proj=nn.Identity(),
            k_proj=nn.Identity(),
            v_proj=nn.Identity(),
            output_proj=nn.Identity(),
            q_norm=nn.Identity(),
        )
    assert attn(x, y).shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(masked, backend):
    torch._dynamo.reset()
    layer = make()
    x, features = data()
    mask = torch.rand(B, S, N) < 0.5 if masked else None
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = layer(x, encoder_input=features, encoder_mask=mask)
    torch.testing.assert_close(
        compiled(x, encoder_input=features, encoder_mask=mask), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_steps_compile_to_one_graph_without_recompiling(backend):
    torch._dynamo.reset()
    layer = cached(make(), N + 2)
    x, features = data()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(x, encoder_input=features)
        compiled(x[:, :1])
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in range(3):
                one = x[:, step : step + 1]
                torch.testing.assert_close(compiled(one), layer(one), rtol=1e-5, atol=1e-6)


def test_gradcheck():
    layer = make(qk_norm=False).double()
    layer.ca_norm = layer.mlp_norm = nn.Identity()
    x, features = (t.requires_grad_() for t in data(torch.float64))
    mask = torch.rand(B, S, N) < 0.5
    mask[0, 2] = False
    assert torch.autograd.gradcheck(
        lambda a, b: layer(a, encoder_input=b, encoder_mask=mask), (x, features), fast_mode=True
    )


def test_is_a_module_with_torchtunes_children():
    layer = make()
    assert isinstance(layer, GatedCrossAttentionLayer)
    assert [name for name, _ in layer.named_children()] == [
        "attn",
        "mlp",
        "ca_norm",
        "mlp_norm",
        "ca_scale",
        "mlp_scale",
    ]


@pytest.mark.gpu
def test_no_synchronisation_on_cuda():
    layer = make().cuda()
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=N + 2)
    x, features = (t.cuda() for t in data())
    with torch.no_grad():
        layer(x, encoder_input=features)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x[:, :1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
