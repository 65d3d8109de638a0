import pytest
import torch
from torch import nn
from torch.func import functional_call
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerSelfAttentionLayer

from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.experts.mixture_of_transformers import MoTLayer, MoTNorm
from torchfuse.modules.experts.routing import Routing
from torchfuse.modules.experts.transformer_expert import ExpertAttention, TransformerExpert

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 18, 3, 1, 6, 11
BATCH, TEXT = 2, 5
SLOTS = {"image": 4, "sound": 2}
LENGTH = TEXT + sum(SLOTS.values())
LAYOUTS = ["prefix", "interleaved"]


class Rotary(nn.Module):
    """Rotary embedding of pairs, in the dtype of what is rotated; torchtune's is fp32."""

    def forward(self, x, *, input_pos=None):
        at = torch.arange(x.shape[1])[None] if input_pos is None else input_pos
        angles = at[..., None, None] * 10_000.0 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        cos, sin = angles.to(x.dtype).cos(), angles.to(x.dtype).sin()
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def linear(rows, columns):
    return nn.Linear(columns, rows, bias=False)


def plain_layer(norms=True):
    """A layer of torchtune's out of parts that compute in float64."""
    attn = MultiHeadAttention(
        embed_dim=WIDTH,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=linear(HEADS * HEAD_DIM, WIDTH),
        k_proj=linear(KV_HEADS * HEAD_DIM, WIDTH),
        v_proj=linear(KV_HEADS * HEAD_DIM, WIDTH),
        output_proj=linear(WIDTH, HEADS * HEAD_DIM),
        pos_embeddings=Rotary(),
        q_norm=nn.RMSNorm(HEAD_DIM, eps=1e-5) if norms else None,
        k_norm=nn.RMSNorm(HEAD_DIM, eps=1e-5) if norms else None,
    )
    mlp = FeedForward(
        gate_proj=linear(HIDDEN, WIDTH), down_proj=linear(WIDTH, HIDDEN), up_proj=linear(HIDDEN, WIDTH)
    )
    layer = TransformerSelfAttentionLayer(
        attn, mlp, sa_norm=nn.RMSNorm(WIDTH, eps=1e-5), mlp_norm=nn.RMSNorm(WIDTH, eps=1e-5)
    )
    return shake(layer.double())


@torch.no_grad()
def shake(module):
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4)
    return module


def mot(*, random=True, norms=True, **options):
    layer = MoTLayer.from_pretrained(plain_layer(norms), list(SLOTS), **options)
    if random:
        shake(layer.fusion_layer)
    return layer


def interleaved():
    """Modalities alternate, and rows have as many tokens of each as they like."""
    image, sound = torch.zeros(BATCH, LENGTH).bool(), torch.zeros(BATCH, LENGTH).bool()
    image[0, [1, 2, 4, 8]] = image[1, 3] = True
    sound[0, 3] = sound[1, [9, 10]] = True
    return Routing(SLOTS, {"image": image, "sound": sound})


def routing_of(layout):
    return Routing(SLOTS) if layout == "prefix" else interleaved()


def members(layout):
    """Whose each token is: 0 for text, then the modalities in turn, ``[b, t]``."""
    if layout == "interleaved":
        places = interleaved().places
        return places["image"].long() + 2 * places["sound"].long()
    sizes = [*SLOTS.values(), TEXT]
    return torch.tensor([1] * sizes[0] + [2] * sizes[1] + [0] * sizes[2]).expand(BATCH, -1)


def hidden(grad=False):
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    return x.requires_grad_(grad)


def positions():
    return torch.randint(0, 30, (BATCH, LENGTH))


def random_mask():
    return (torch.rand(BATCH, LENGTH, LENGTH) < 0.5).tril() | torch.eye(LENGTH, dtype=torch.bool)


def algorithm_1(layer, x, whose, at, mask):
    """Token by token the weights of its modality, by einsum; one attention over all."""
    parts = [layer.wrapped, *layer.fusion_layer.values()]

    def chosen(function):
        return sum(function(p) * (whose == i)[..., None] for i, p in enumerate(parts))

    def norm(weight, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def project(name, x, heads, norm_name=None):
        def one(part):
            h = torch.einsum(
                "btd,ed->bte", norm(part.sa_norm.weight, x), getattr(part.attn, name).weight
            )
            h = h.unflatten(-1, (heads, HEAD_DIM))
            if norm_name is not None:
                h = Rotary()(h, input_pos=at)
                scale = getattr(part.attn, norm_name)
                h = h if scale is None else norm(scale.weight, h)
            return h.flatten(2)

        return chosen(one).unflatten(-1, (heads, HEAD_DIM))

    q = project("q_proj", x, HEADS, "q_norm")
    k = project("k_proj", x, KV_HEADS, "k_norm").repeat_interleave(HEADS // KV_HEADS, dim=2)
    v = project("v_proj", x, KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q, k) / HEAD_DIM**0.5
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    o = torch.einsum("bhst,bthd->bshd", weights, v).flatten(2)
    h = x + chosen(lambda p: torch.einsum("bte,de->btd", o, p.attn.output_proj.weight))

    def feed_forward(part):
        n = norm(part.mlp_norm.weight, h)
        gate, up = (torch.einsum("btd,fd->btf", n, w.weight) for w in (part.mlp.w1, part.mlp.w3))
        return torch.einsum("btf,df->btd", gate * torch.sigmoid(gate) * up, part.mlp.w2.weight)

    return h + chosen(feed_forward)


@pytest.mark.parametrize("norms", [True, False], ids=["qk-norms", "none"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "defaults"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_algorithm_1(layout, given, norms):
    layer, x = mot(norms=norms), hidden()
    causal = torch.ones(1, LENGTH, LENGTH).tril().bool().expand(BATCH, -1, -1)
    mask, at = (random_mask(), positions()) if given else (None, None)
    out = layer(x, mask=mask, input_pos=at, routing=routing_of(layout))
    counted = torch.arange(LENGTH).expand(BATCH, -1)
    expected = algorithm_1(
        layer, x, members(layout), at if given else counted, mask if given else causal
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("layout", "only"), [("prefix", False), ("prefix", True), ("interleaved", False)]
)
def test_gradients(layout, only):
    layer, x = mot(keys_and_values_only=only), hidden(grad=True)
    named = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if name in ("attn.k_proj.weight", "sa_norm.weight") or "sound.attn.k" in name
    }
    assert len(named) == 4

    def run(x, *values):
        given = dict(zip(named, values, strict=True))
        return functional_call(layer, given, (x,), {"routing": routing_of(layout)})

    assert torch.autograd.gradcheck(run, (x, *named.values()), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_warm_experts_do_what_the_pretrained_layer_does(layout):
    layer, x, at, mask = mot(random=False), hidden(), positions(), random_mask()
    assert layer.experts_are_fresh()
    out = layer(x, mask=mask, input_pos=at, routing=routing_of(layout))
    torch.testing.assert_close(out, layer.wrapped(x, mask=mask, input_pos=at), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_are_each_modalitys_own(layout):
    plain, x, call = plain_layer(), hidden(), {"routing": routing_of(layout)}
    plain.sa_scale, plain.mlp_scale = (linear(WIDTH, WIDTH).double() for _ in range(2))
    layer = MoTLayer.from_pretrained(plain, list(SLOTS))
    torch.testing.assert_close(layer(x, **call), plain(x), rtol=0, atol=1e-12)
    for scale in ("sa_scale", "mlp_scale"):
        before = layer(x, **call)
        nn.init.zeros_(getattr(layer.fusion_layer["image"], scale).weight)
        moved = (layer(x, **call) - before).abs().amax(dim=-1) > 1e-6
        assert torch.equal(moved, members(layout) == 1)


@pytest.mark.parametrize("only", [False, True], ids=["whole", "keys and values"])
def test_dropout_is_the_pretrained_layers_and_in_training_only(only):
    layer, x, routing = mot(keys_and_values_only=only), hidden(), Routing(SLOTS)
    expected = layer(x, routing=routing)
    layer.attn.attn_dropout = 0.5
    assert torch.equal(layer.eval()(x, routing=routing), expected)
    assert not torch.allclose(layer.train()(x, routing=routing), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_experts_let_their_stream_pass_and_are_seen(layout):
    layer, x = mot(random=False, start="zero"), hidden()
    out, whose = layer(x, routing=routing_of(layout)), members(layout)
    assert torch.equal(out[whose > 0], x[whose > 0])
    warm = layer.wrapped(x)
    torch.testing.assert_close(out[whose == 0], warm[whose == 0], rtol=0, atol=1e-12)
    changed = x + (whose > 0)[..., None] * torch.randn_like(x)
    last = layer(changed, routing=routing_of(layout))[whose == 0]
    assert not torch.allclose(last, out[whose == 0])


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "causal"])
def test_text_attends_only_to_keys_and_values(mask):
    whole, only = mot(), mot(keys_and_values_only=True)
    given = {n: p for n, p in whole.state_dict().items() if n in only.state_dict()}
    only.load_state_dict(given)
    assert {n.split("image.")[1] for n in only.fusion_params() if "image" in n} == {
        "attn.k_proj.weight",
        "attn.v_proj.weight",
        "attn.k_norm.weight",
        "sa_norm.weight",
    }
    x, routing = hidden(), Routing(SLOTS)
    call = {"mask": random_mask() if mask else None, "input_pos": positions(), "routing": routing}
    out, front = only(x, **call), LENGTH - TEXT
    torch.testing.assert_close(out[:, front:], whole(x, **call)[:, front:], rtol=0, atol=1e-12)
    assert torch.equal(out[:, :front], x[:, :front])
    with pytest.raises(ModelError, match="keys and values only, which is for modalities in front"):
        only(x, routing=interleaved())


def test_text_alone_is_the_pretrained_layers_to_the_bit():
    layer, x, at = mot(), hidden(), positions()
    expected = layer.wrapped(x, input_pos=at)
    assert torch.equal(layer(x, input_pos=at, encoder_input=None), expected)
    assert torch.equal(layer(x, input_pos=at, routing=Routing({})), expected)


def test_slots_without_a_token_change_nothing():
    layer, x, routing = mot(), hidden(), interleaved()
    roomy = Routing({"image": 9, "sound": LENGTH}, routing.places)
    torch.testing.assert_close(layer(x, routing=roomy), layer(x, routing=routing), rtol=0, atol=1e-12)


@pytest.mark.parametrize("only", [False, True], ids=["whole", "keys and values"])
@pytest.mark.parametrize("there", [[], ["sound"]], ids=["nothing there", "one there"])
def test_a_stand_in_takes_part_and_changes_no_bit(there, only):
    layer, x = mot(keys_and_values_only=only), hidden(grad=True)
    slots = {name: SLOTS[name] for name in there}
    absent = {n: torch.randn(1, 1, WIDTH, requires_grad=True) for n in SLOTS if n not in there}
    out = layer(x, routing=Routing(slots, stand_ins=absent))
    assert torch.equal(out, layer(x, routing=Routing(slots)))
    out.square().sum().backward()
    for name, parameter in layer.fusion_layer.named_parameters():
        assert parameter.grad.any() == (name.split(".")[0] in there), name
    assert all(not stand_in.grad.any() for stand_in in absent.values())


def test_pretrained_names_stay_and_new_ones_have_a_prefix():
    layer, plain = mot(), plain_layer()
    names = list(layer.state_dict())
    own = list(plain.state_dict())
    assert names[: len(own)] == own
    assert names[len(own) :] == layer.fusion_params()
    assert [n for n, _ in layer.named_parameters()] == names
    per = [n.removeprefix("fusion_layer.image.") for n in layer.fusion_params() if ".image." in n]
    assert per == own
    assert layer.attn is layer.wrapped.attn
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(layer.attn.q_proj.weight, plain.attn.q_proj.weight)


@pytest.mark.parametrize("start", ["warm", "zero"])
def test_experts_are_reset_to_loaded_values(start):
    layer = mot(random=False, start=start)
    assert layer.experts_are_fresh()
    layer.load_state_dict(plain_layer().state_dict(), strict=False)
    assert not layer.experts_are_fresh()
    layer.reset_experts()
    assert layer.experts_are_fresh()
    expert = layer.fusion_layer["sound"]
    assert torch.equal(expert.attn.q_proj.weight, layer.attn.q_proj.weight)
    last = [expert.attn.output_proj.weight, expert.mlp.w2.weight]
    assert all(bool(weight.any()) == (start == "warm") for weight in last)
    assert not layer.to("meta").experts_are_fresh()


def test_experts_of_a_frozen_layer_train():
    layer = MoTLayer.from_pretrained(plain_layer().requires_grad_(False), ["eye"])
    assert all(p.requires_grad for p in layer.fusion_layer.parameters())
    assert not any(p.requires_grad for p in layer.wrapped.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_final_norm_is_each_modalitys_own(layout):
    norm, x = MoTNorm(shake(nn.RMSNorm(WIDTH).double()), list(SLOTS)), hidden()
    assert norm.experts_are_fresh()
    expected = norm(x)
    assert torch.equal(norm(x, routing=routing_of(layout)), expected)
    shake(norm.fusion_layer)
    parts = [norm.wrapped, *norm.fusion_layer.values()]
    by_token = sum(p(x) * (members(layout) == i)[..., None] for i, p in enumerate(parts))
    torch.testing.assert_close(norm(x, routing=routing_of(layout)), by_token, rtol=0, atol=1e-12)
    assert torch.equal(norm(x), expected)
    absent = Routing({}, {}, stand_ins={n: torch.randn(1, 1, WIDTH) for n in SLOTS})
    out = norm(x, routing=absent)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in norm.fusion_layer.parameters())


def expert(num_heads=HEADS, num_kv_heads=KV_HEADS, only=False):
    attn = ExpertAttention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        k_proj=linear(num_kv_heads * HEAD_DIM, WIDTH),
        v_proj=linear(num_kv_heads * HEAD_DIM, WIDTH),
        q_proj=None if only else linear(num_heads * HEAD_DIM, WIDTH),
        output_proj=None if only else linear(WIDTH, num_heads * HEAD_DIM),
    )
    whole = {} if only else {"mlp": nn.Linear(WIDTH, WIDTH), "mlp_norm": nn.RMSNorm(WIDTH)}
    return TransformerExpert(attn, sa_norm=nn.RMSNorm(WIDTH), **whole)


def test_what_does_not_fit_is_named():
    layer = plain_layer()
    with pytest.raises(
        ModelError, match=r"width of a head, 3, 1, 6; 'eye' has 5, 1, 6; 'ear' has 3, 3, 6\."
    ):
        MoTLayer(layer, {"eye": expert(5), "nose": expert(), "ear": expert(num_kv_heads=3)})
    with pytest.raises(ModelError, match="keys and values only, or none is; here only 'ear'"):
        MoTLayer(layer, {"eye": expert(), "ear": expert(only=True)})
    with pytest.raises(ConfigError, match='start must be "warm" or "zero", got \'cold\''):
        MoTLayer.from_pretrained(layer, ["eye"], start="cold")
    maps = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6, "k_proj": layer.attn.k_proj}
    with pytest.raises(ModelError, match="q_proj and output_proj are given together"):
        ExpertAttention(**maps, v_proj=layer.attn.v_proj, q_proj=layer.attn.q_proj)
    with pytest.raises(ModelError, match="queries, mlp and mlp_norm, or none of them"):
        TransformerExpert(expert().attn, sa_norm=nn.RMSNorm(WIDTH))
    with pytest.raises(ModelError, match="fusion_layer would be hidden"):
        MoTLayer.from_pretrained(MoTLayer.from_pretrained(layer, ["eye"]), ["ear"])
    layer.mlp = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(ModelError, match="whose last map is w2, as torchtune's; got a Linear"):
        MoTLayer.from_pretrained(layer, ["eye"], start="zero")
    assert MoTLayer.from_pretrained(layer, ["eye"]).experts_are_fresh()
