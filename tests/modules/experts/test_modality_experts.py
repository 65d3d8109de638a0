import copy
import math
import pickle

import pytest
import torch
from ranks import run_on_ranks
from support import WIDTH, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector
from torchtune.modules import FeedForward, MultiHeadAttention, TransformerSelfAttentionLayer

from torchfuse import get_fusion_params
from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.experts.modality_experts import ExpertOptions, MoMaLayer, expert_load
from torchfuse.modules.experts.routing import Routing
from torchfuse.naming import canonical_name

ROWS, TEXT = 2, 7
SLOTS = {"image": 5, "audio": 3}
LENGTH = TEXT + sum(SLOTS.values())
NUMBERS = {"num_experts": {"image": 3, "audio": 2}, "num_text_experts": 3}


def pretrained(seed=0):
    return tiny_decoder(seed).layers[0]


def moma(layer=None, *, seed=5, noise=False, **options):
    torch.manual_seed(seed)
    options = ExpertOptions(noise=noise, **NUMBERS | options)
    layer = MoMaLayer(layer or pretrained(), list(SLOTS), options)
    with torch.no_grad():  # what begins at zero would hide problems
        for name, p in layer.named_parameters():
            if ".text." in name and "w2" in name:
                p.normal_(std=0.2)
    return layer


def layer64(dim=6):
    """A pretrained layer that computes in float64 throughout."""
    torch.manual_seed(0)
    attn = MultiHeadAttention(
        embed_dim=dim,
        num_heads=2,
        num_kv_heads=1,
        head_dim=3,
        q_proj=nn.Linear(dim, 6),
        k_proj=nn.Linear(dim, 3),
        v_proj=nn.Linear(dim, 3),
        output_proj=nn.Linear(6, dim),
        max_seq_len=31,
    )
    mlp = FeedForward(
        gate_proj=nn.Linear(dim, 7), down_proj=nn.Linear(7, dim), up_proj=nn.Linear(dim, 7)
    )
    layer = TransformerSelfAttentionLayer(
        attn,
        mlp,
        sa_norm=nn.RMSNorm(dim),
        mlp_norm=nn.RMSNorm(dim),
        sa_scale=nn.Linear(dim, dim),
        mlp_scale=nn.Linear(dim, dim),
    )
    return layer.double()


def hidden(rows=ROWS, length=LENGTH, dim=WIDTH, seed=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, dim, generator=generator, dtype=dtype)


def prefix(*, pads=True):
    if not pads:
        return Routing(SLOTS)
    audio, text = torch.ones(ROWS, 3, dtype=torch.bool), torch.ones(ROWS, TEXT, dtype=torch.bool)
    audio[1, 1:] = False
    text[0, 4:] = False
    return Routing(SLOTS, valid={"audio": audio}, valid_text=text)


def interleaved(*, pads=True):
    """Rows with 5 and 2 image tokens, and 0 and 3 of audio."""
    image, audio = (torch.zeros(ROWS, LENGTH, dtype=torch.bool) for _ in range(2))
    image[0, [1, 2, 6, 7, 8]] = True
    image[1, [3, 9]] = True
    audio[1, [4, 5, 12]] = True
    text = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    if pads:
        text[1, 13:] = False
    return Routing(SLOTS, {"image": image, "audio": audio}, valid_text=text)


LAYOUTS = {"prefix": prefix, "interleaved": interleaved}


def members(layout):
    """The tokens of each modality that count, as (row, position), and the pads among text."""
    found = {"image": [], "audio": [], "text": []}
    for b in range(ROWS):
        for t in range(LENGTH):
            if layout.places is None:
                name = "image" if t < 5 else "audio" if t < 8 else "text"
                valid = layout.valid.get(name)
                counts = valid is None or valid[b, t - 5]
                if name == "text":
                    counts = layout.valid_text is None or layout.valid_text[b, t - 8]
            else:
                name = next((n for n, place in layout.places.items() if place[b, t]), "text")
                counts = name != "text" or layout.valid_text[b, t]
            if counts:
                found[name].append((b, t))
    return found


def reference(layer, x, layout):
    """The layer, token by token."""
    base = layer.wrapped
    normed = base.sa_norm(x)
    h = x + base.sa_scale(base.attn(normed, normed))
    tokens, said = base.mlp_norm(h), torch.zeros_like(x)
    counted = members(layout)
    other = {*counted["image"], *counted["audio"]}
    for b in range(ROWS):
        for t in range(LENGTH):
            in_slot = layout.places is None and t < 8
            if (b, t) not in other and not in_slot:
                said[b, t] = base.mlp(tokens[b, t])
    for name, places in counted.items():
        weight, experts = layer.fusion_layer.routers[name].weight, layer.fusion_layer.experts[name]
        share = {"image": 3, "audio": 2, "text": 3}[name]
        k = min(len(places), max(1, math.ceil(len(places) / share)))
        for e, expert in enumerate(experts):
            score = {place: (tokens[place] @ weight[e]).sigmoid() for place in places}
            for place in sorted(places, key=lambda p: -score[p].item())[:k]:
                said[place] += score[place] * expert(tokens[place])
    return h + base.mlp_scale(said)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pads", [False, True])
def test_equals_a_loop_over_tokens(layout, pads):
    routing, layer = LAYOUTS[layout](pads=pads), moma(layer64()).double()
    x = hidden(dim=6, dtype=torch.float64).requires_grad_()
    same = x.detach().clone().requires_grad_()
    out, expected = layer(x, routing=routing), reference(layer, same, routing)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    sought = hidden(dim=6, dtype=torch.float64, seed=1)
    (out * sought).sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if "auxiliary" not in n}
    layer.zero_grad()
    (expected * sought).sum().backward()
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-10, atol=1e-12)
    for name, p in layer.named_parameters():
        if "auxiliary" not in name:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-12, msg=name)
            assert p.grad.any(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(layout, training):
    layer = moma(layer64()).double().train(training)
    learned = [p for n, p in layer.named_parameters() if "fusion_layer" in n and "auxiliary" not in n]
    some = [p for p in learned if p.shape[0] < 6]  # the routers
    some += list(layer.fusion_layer.experts["audio"][1].parameters())
    x = hidden(dim=6, dtype=torch.float64).requires_grad_()
    routing = LAYOUTS[layout]()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, routing=routing), (x, *some), fast_mode=True)


@pytest.mark.parametrize("start", ["warm", "zero"])
@pytest.mark.parametrize("num_text_experts", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_text_alone_keeps_every_bit(start, num_text_experts, training):
    options = ExpertOptions(num_text_experts=num_text_experts, start=start)
    layer = MoMaLayer(pretrained(), ["image"], options).train(training)
    x = hidden()
    expected = pretrained()(x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x, routing=Routing({}), encoder_input=None, encoder_mask=None), expected)
    assert ("text" in layer.fusion_layer.experts) == (num_text_experts > 1)


@pytest.mark.parametrize("start", ["warm", "zero"])
def test_new_experts_begin_as_asked(start):
    layer = pretrained().requires_grad_(False)
    options = ExpertOptions(num_experts=2, num_text_experts=3, start=start)
    fused = MoMaLayer(layer, ["image"], options)
    for name, count in (("image", 2), ("text", 2)):
        assert len(fused.fusion_layer.experts[name]) == count
        zero = start == "zero" or name == "text"
        for expert in fused.fusion_layer.experts[name]:
            for (part, new), old in zip(expert.named_parameters(), layer.mlp.parameters(), strict=True):
                assert new.requires_grad
                assert new.data_ptr() != old.data_ptr()
                wanted = torch.zeros_like(old) if zero and part.startswith("w2") else old
                assert torch.equal(new, wanted)
    # A zero start passes features by.
    x, routing = hidden(length=9), Routing({"image": 9})
    attended = x + layer.attn(layer.sa_norm(x), layer.sa_norm(x))
    assert torch.equal(fused(x, routing=routing), attended) == (start == "zero")


def test_the_dtype_is_the_layers():
    layer = moma(pretrained().bfloat16(), num_experts=2)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(hidden().bfloat16(), routing=prefix()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moma()(hidden(), routing=prefix()).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_padding_takes_no_place_at_an_expert(layout, training):
    layer, routing = moma().train(training), LAYOUTS[layout]()
    counted = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for places in members(routing).values():
        for place in places:
            counted[place] = True
    assert not counted.all()
    mask = torch.eye(LENGTH, dtype=torch.bool).expand(ROWS, -1, -1)  # attention would mix them
    x = hidden().requires_grad_()
    changed = torch.where(counted[..., None], x.detach(), 50 * hidden(seed=4)).requires_grad_()
    out, other = (layer(h, routing=routing, mask=mask) for h in (x, changed))
    assert torch.equal(out[counted], other[counted])
    if training:
        load = expert_load(layer)[""]
        sizes = {name: len(places) for name, places in members(routing).items()}
        for name, experts in (("image", 3), ("audio", 2), ("text", 3)):
            k = math.ceil(sizes[name] / experts)
            assert load[name].tolist() == pytest.approx([k / sizes[name]] * len(load[name]))
    other[counted].square().sum().backward()
    assert not changed.grad[~counted].any()
    assert changed.grad[counted].any()


def test_in_evaluation_experts_choose_token_by_token():
    layer, x = moma().eval(), hidden()
    both = layer(x, routing=prefix(pads=False))
    assert any(0 < share < 1 for load in expert_load(layer)[""].values() for share in load)
    for row in range(ROWS):
        alone = layer(x[row : row + 1], routing=prefix(pads=False))
        torch.testing.assert_close(alone[0], both[row])
    later = torch.cat([x[:, :12], hidden(seed=4)[:, 12:]], dim=1)
    torch.testing.assert_close(layer(later, routing=prefix(pads=False))[:, :12], both[:, :12])
    # In training both would matter, or the test above says nothing.
    layer.train()
    both = layer(x, routing=prefix(pads=False))
    assert not torch.allclose(layer(x[:1], routing=prefix(pads=False))[0], both[0])
    assert not torch.allclose(layer(later, routing=prefix(pads=False))[:, :12], both[:, :12])


def test_cached_steps_equal_the_whole():
    layer, x = moma().eval(), hidden()
    expected = layer(x, routing=prefix(pads=False))
    layer.setup_caches(ROWS, torch.float32, encoder_max_seq_len=None, decoder_max_seq_len=LENGTH)
    assert layer.caches_are_setup()
    assert layer.caches_are_enabled()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(ROWS, -1, -1)
    for _ in range(2):
        layer.reset_cache()
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        out = [
            layer(x[:, :9], routing=prefix(pads=False), mask=causal[:, :9], input_pos=positions[:, :9])
        ]
        for t in range(9, LENGTH):
            step = slice(t, t + 1)
            out.append(layer(x[:, step], mask=causal[:, step], input_pos=positions[:, step]))
        torch.testing.assert_close(torch.cat(out, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_without_auxiliary_routers_evaluation_chooses_and_caches_are_refused():
    layer = moma(auxiliary_router=False)
    x, routing = hidden(), prefix()
    assert torch.equal(layer(x, routing=routing), layer.eval()(x, routing=routing))
    with pytest.raises(
        ModelError, match="cannot generate: each chooses.*later ones.*auxiliary_router=True"
    ):
        layer.setup_caches(ROWS, torch.float32, encoder_max_seq_len=None, decoder_max_seq_len=9)
    assert not layer.caches_are_setup()
    takes_all = moma(auxiliary_router=False, capacity=1.0)
    takes_all.setup_caches(ROWS, torch.float32, encoder_max_seq_len=None, decoder_max_seq_len=9)
    assert takes_all.caches_are_setup()


def test_caches_are_refused_if_any_modality_depends_on_the_batch():
    one = moma(auxiliary_router=False, num_experts={"image": 1, "audio": 2}, num_text_experts=1)
    with pytest.raises(ModelError, match="cannot generate"):
        one.check_caches()
    moma(auxiliary_router=False, num_experts=1, num_text_experts=1).check_caches()


def test_options_of_auxiliary_routers_reach_them():
    gradients = []
    for weight in (0.25, 0.5):
        layer = moma(auxiliary_dim=7, auxiliary_loss_weight=weight)
        layer(hidden(), routing=prefix()).sum().backward()
        gradients.append(layer.fusion_layer.router("image").auxiliary.w1.weight.grad)
    assert gradients[0].shape == (7, WIDTH)
    assert gradients[0].any()
    torch.testing.assert_close(2 * gradients[0], gradients[1])


def test_noise_moves_training_and_repeats_with_the_seed():
    layer, x, routing = moma(noise=True), hidden(), prefix()

    def run(seed):
        torch.manual_seed(seed)
        return layer(x, routing=routing)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    layer.eval()
    assert torch.equal(run(1), run(2))


def test_capacity_and_fewer_tokens_than_experts():
    layer = moma(num_experts=5, capacity=0.07)
    layer(hidden(rows=10, length=13), routing=Routing({"image": 10, "audio": 1}))
    load = expert_load(layer)[""]
    assert load["image"].tolist() == pytest.approx([0.07] * 5)  # 7 of 100
    assert load["audio"].tolist() == pytest.approx([0.1] * 5)
    layer(hidden(rows=1, length=3), routing=Routing({"audio": 2}))
    load = expert_load(layer)[""]
    assert load["audio"].tolist() == [0.5] * 5
    assert load["image"].tolist() == pytest.approx([0.07] * 5)  # did not run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_modality_without_a_token_costs_nothing(layout):
    routing = LAYOUTS[layout]()
    if routing.places is None:
        routing.valid["audio"][:] = False
    else:
        places = {"image": routing.places["image"], "audio": torch.zeros(ROWS, LENGTH, dtype=torch.bool)}
        routing = Routing(SLOTS, places, valid_text=routing.valid_text)
    layer = moma()
    out = layer(hidden(), routing=routing)
    assert out.isfinite().all()
    out.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() != (".audio." in name), name
    assert expert_load(layer)[""]["audio"].tolist() == [0, 0]


@pytest.mark.parametrize("noise", [False, True])
def test_stand_ins_change_no_bit_and_reach_every_new_weight(noise):
    layer, x = moma(noise=noise), hidden(length=TEXT + 5)
    stand_ins = {"audio": hidden(rows=1, length=2, seed=2)}

    def run(**missing):
        layer.zero_grad()
        torch.manual_seed(0)
        out = layer(x, routing=Routing({"image": 5}, **missing))
        follows = torch.rand(3)
        out.square().sum().backward()
        return out, follows, {n: p.grad for n, p in layer.named_parameters()}

    out, follows, grads = run(stand_ins=stand_ins)
    plain, as_before, plain_grads = run()
    assert torch.equal(out, plain)
    assert torch.equal(follows, as_before)
    for name, grad in grads.items():
        if ".audio." in name:
            assert not grad.any() and plain_grads[name] is None, name
        else:
            assert torch.equal(grad, plain_grads[name]) and grad.any(), name


def both_ways(layer, other, **inputs):
    """Value and gradients of two forms of one layer under one seed."""
    results = []
    for one in (layer, other):
        x = hidden().requires_grad_()
        torch.manual_seed(3)
        out = one(x, **inputs)
        out.square().sum().backward()
        grads = {canonical_name(n): p.grad for n, p in one.named_parameters()}
        results.append({"out": out, "x": x.grad, **grads})
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("around", ["layer", "pretrained", "both"])
def test_activation_checkpointing_equals_eager(layout, around):
    plain, routing = moma(noise=True), LAYOUTS[layout]()
    layer = wrapped = copy.deepcopy(plain)
    if around != "layer":
        layer.layer = checkpoint_wrapper(layer.layer)
    if around != "pretrained":
        wrapped = checkpoint_wrapper(layer)
    runs = []
    layer.fusion_layer.experts["image"][0].register_forward_hook(lambda *_: runs.append(1))
    expected, got = both_ways(plain, wrapped, routing=routing)
    assert len(runs) > 1  # run again in backward
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    assert expert_load(wrapped)[""]["image"].tolist() == expert_load(plain)[""]["image"].tolist()


@pytest.mark.parametrize(
    ("layout", "checkpointed", "training"),
    [
        ("prefix", False, True),
        ("interleaved", True, True),
        ("interleaved", False, False),
    ],
)
def test_compiled_equals_eager(layout, checkpointed, training):
    plain, routing = moma(noise=True, num_experts=2).train(training), LAYOUTS[layout]()
    routed = copy.deepcopy(plain)
    inner = checkpoint_wrapper(routed) if checkpointed else routed
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    expected, got = both_ways(plain, compiled, routing=routing)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            assert not training and "auxiliary" in name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name, load in expert_load(plain)[""].items():
        assert expert_load(compiled)[""][name].tolist() == load.tolist()


def test_names_agree_in_every_view():
    base = pretrained()
    own = [name for name, _ in base.named_parameters()]
    layer = MoMaLayer(base, ["image"], ExpertOptions(num_experts=2, num_text_experts=2))
    new = [
        f"fusion_layer.experts.{m}.w{w}.weight"
        for m in ("text.0", "image.0", "image.1")
        for w in (1, 2, 3)
    ]
    for m in ("text", "image"):
        new.append(f"fusion_layer.routers.{m}.weight")
        new += [
            f"fusion_layer.routers.{m}.auxiliary.w{w}.{p}" for w in (1, 2) for p in ("weight", "bias")
        ]
    assert [name for name, _ in layer.named_parameters()] == [*own, *new]
    assert list(layer.state_dict()) == [*own, *new]
    assert list(get_model_state_dict(layer)) == [*own, *new]
    assert layer.fusion_params() == new
    assert list(get_fusion_params(nn.Sequential(base, layer))) == [f"1.{n}" for n in new]
    assert layer.get_parameter("mlp.w1.weight") is base.mlp.w1.weight
    assert layer.load_state_dict(pretrained(1).state_dict(), strict=False).missing_keys == new
    assert torch.equal(layer.mlp.w2.weight, pretrained(1).mlp.w2.weight)
    inside = MoMaLayer(checkpoint_wrapper(pretrained()), ["image"], layer.options)
    assert [canonical_name(n) for n in inside.state_dict()] == [*own, *new]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(copied):
    layer, x = moma(layer64()).double(), hidden(dim=6, dtype=torch.float64)
    for attention in (layer.attn,):  # torchtune's holds a local function, which no pickle takes
        attention._attention_call = attend
    other, expected = copied(layer), layer(x, routing=prefix())
    assert torch.equal(other(x, routing=prefix()), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(layer(x, routing=prefix()), expected)


def attend(q, k, v, mask, dropout_p, is_causal):
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


def test_built_on_the_meta_device_and_loaded():
    source = moma()
    with torch.device("meta"):
        layer = MoMaLayer(pretrained(), list(SLOTS), source.options)
    assert all(p.is_meta for p in layer.parameters())
    layer.load_state_dict(source.state_dict(), assign=True)
    layer.attn.pos_embeddings.rope_init()
    assert torch.equal(layer(hidden(), routing=prefix()), source(hidden(), routing=prefix()))
    assert expert_load(layer)[""]["image"].tolist() == expert_load(source)[""]["image"].tolist()


def test_load_names_layers_through_wrappers():
    decoder = tiny_decoder()
    decoder.layers[1] = checkpoint_wrapper(MoMaLayer(decoder.layers[1], ["image"]))
    model = torch.compile(nn.ModuleDict({"decoder": decoder}), backend="eager")
    assert {name: list(load) for name, load in expert_load(model).items()} == {
        "decoder.layers.1": ["image"]
    }
    assert expert_load(model)["decoder.layers.1"]["image"].tolist() == [0] * 4
    with pytest.raises(ModelError, match="TransformerDecoder has no layer with experts"):
        expert_load(tiny_decoder())


def test_numbers_out_of_range_are_all_named():
    with pytest.raises(ConfigError) as info:
        ExpertOptions(
            num_experts={"image": 0, "audio": 2},
            num_text_experts=0,
            capacity=1.5,
            start="cold",
            auxiliary_dim=0,
            auxiliary_loss_weight=-1.0,
        )
    for problem in (
        "num_experts of 'image' must be at least 1, got 0",
        "num_text_experts must be at least 1, got 0",
        "auxiliary_dim must be at least 1, got 0",
        "capacity must lie in (0, 1], got 1.5",
        "start must be 'warm' or 'zero', got 'cold'",
        "auxiliary_loss_weight must be 0 or more, got -1.0",
    ):
        assert problem in str(info.value)
    with pytest.raises(ConfigError, match=r"num_experts must be at least 1, got -3"):
        ExpertOptions(num_experts=-3)
    with pytest.raises(ConfigError, match="weight must be 0 or more, got nan"):
        ExpertOptions(auxiliary_loss_weight=float("nan"))


@pytest.mark.parametrize("names", [["text"], ["a.b"], [""], ["keys"], ["image", "image"]])
def test_names_that_cannot_serve_are_refused(names):
    with pytest.raises(ModelError, match=r"names of modalities become parts.*got \["):
        MoMaLayer(pretrained(), names)


def test_layers_that_cannot_serve_are_refused():
    with pytest.raises(ModelError, match="Linear cannot get experts: it lacks sa_norm, attn"):
        MoMaLayer(nn.Linear(3, 3), ["image"])
    with pytest.raises(ModelError) as info:
        MoMaLayer(nn.Linear(3, 3), [], ExpertOptions(num_experts={"audio": 2}))
    for problem in ("no modality beside text", "names of the modalities, ; got audio", "it lacks"):
        assert problem in str(info.value)
    with pytest.raises(ModelError, match=r"fusion_layer would be hidden"):
        MoMaLayer(moma(), ["image"])
    layer = pretrained()
    layer.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(ModelError, match="last projection is w2"):
        MoMaLayer(layer, ["image"])
    layer = pretrained()
    layer.mlp.w2.lora = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"w2 of its mlp must be linear.*has lora\.bias, lora\.weight"):
        MoMaLayer(layer, ["image"], ExpertOptions(start="zero"))
    assert MoMaLayer(layer, ["image"]).fusion_layer.experts["image"][0].w2.lora is not layer.mlp.w2.lora
    with pytest.raises(ModelError, match="feed-forward is quantized.*quantize after fusing"):
        MoMaLayer(quantized(pretrained()), ["image"])


def quantized(layer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer.mlp, Int8WeightOnlyConfig(version=2))
    return layer


def test_an_unknown_modality_is_named():
    stand_ins = {"smell": torch.zeros(1, 1, WIDTH)}
    with pytest.raises(ModelError, match="No experts of smell, text, video.*built for image, audio"):
        moma()(hidden(), routing=Routing({"video": 2, "text": 1, "image": 1}, stand_ins=stand_ins))


def step(rank):
    def make():
        return nn.ModuleList([moma(), moma(pretrained(1), seed=6)])

    def run(layers, of_rank):
        torch.manual_seed(of_rank)
        x = hidden(seed=of_rank)
        routing = prefix() if of_rank == 0 else Routing({}, stand_ins=dict.fromkeys(SLOTS, x[:1, :1]))
        for layer in layers:
            x = layer(x, routing=routing)
        return x.square().mean()

    alone, layers = make(), make()
    for layer in layers:
        fully_shard(layer)
    loss = run(layers, rank)
    loss.backward()
    losses = [run(alone, 0), run(alone, 1)]
    torch.testing.assert_close(loss, losses[rank])
    (sum(losses) / 2).backward()
    for (name, p), (_, q) in zip(layers.named_parameters(), alone.named_parameters(), strict=True):
        # FSDP divides every gradient; here only the loss was, and not what joined in backward.
        expected = q.grad / 2 if "auxiliary" in name else q.grad
        assert expected.any(), name
        torch.testing.assert_close(p.grad.full_tensor(), expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.distributed
def test_two_ranks_one_image():
    run_on_ranks(step)


def test_every_new_weight_learns_by_the_second_step():
    options = ExpertOptions(num_experts=2, num_text_experts=2, start="zero")
    layer = MoMaLayer(pretrained(), ["image"], options)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(hidden(), routing=Routing({"image": 5})).square().mean().backward()
        before = parameters_to_vector(layer.fusion_layer.parameters()).detach().clone()
        optimizer.step()
        assert not torch.equal(parameters_to_vector(layer.fusion_layer.parameters()), before)
    for name, p in layer.fusion_layer.named_parameters():
        assert p.grad.any(), name
