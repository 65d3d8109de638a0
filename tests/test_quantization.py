import copy
import pickle

import pytest
import torch
from hf import VISION
from support import (
    IMAGE,
    LAYERS,
    VOCAB,
    TinyEncoder,
    inputs,
    open_gates,
    same_state,
    state,
    text,
    text_with_image,
    tiny_decoder,
)
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from torchfuse import (
    describe,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    quantize,
    save_fusion,
    set_trainable,
)
from torchfuse.encoders.hf import HfEncoder
from torchfuse.params import partition, quantized_dtype

# How far logits may move: int8 has 256 steps a row, float8 3 bits of mantissa, nf4 16 values.
SCHEMES = {"int8_weight_only": 0.02, "int8_dynamic": 0.02, "float8_weight_only": 0.06, "nf4": 0.3}
DTYPES = {
    "int8_weight_only": "int8",
    "int8_dynamic": "int8",
    "float8_weight_only": "float8_e4m3fn",
    "nf4": "nf4",
}
A_LAYER = 7  # linear layers of one decoder layer


def make(*, dtype=torch.float32, named=False, seed=0, **options):
    """Two layers wide enough for NF4; keys and values of half the width are too small for it."""
    decoder = tiny_decoder(
        seed,
        num_layers=2,
        vocab_size=131,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        intermediate_dim=256,
    )
    encoder = {"eye": TinyEncoder(), "ear": TinyEncoder()} if named else TinyEncoder()
    torch.manual_seed(5)
    model = fuse(decoder, encoder, every=2, fusion_vocab_size=3, fusion_head=True, **options)
    return open_gates(model).to(dtype).eval()


def small(**options):
    return open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2, **options)).eval()


def given(dtype=torch.float32):
    return {"encoder_input": {"x": inputs()["x"].to(dtype)}}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def quantized_names(model):
    return {name for name, p in model.named_parameters() if quantized_dtype(p)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_stay_close_and_fusion_and_names_stay_as_they_are(scheme, dtype):
    model = make(fusion_trainable=False, dtype=dtype)
    names, before = [n for n, _ in model.named_parameters()], state(model)
    modules = {name: type(module) for name, module in model.named_modules()}
    with torch.no_grad():
        expected = model(text(), **given(dtype))
        done = quantize(model, scheme)
        moved = distance(model(text(), **given(dtype)).float(), expected.float())
    assert 0 < moved < SCHEMES[scheme]
    assert [n for n, _ in model.named_parameters()] == names and list(model.state_dict()) == list(before)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert quantized_names(model) == set(done.quantized) <= set(partition(model)["decoder"])
    plain = before.keys() - set(done.quantized)
    assert get_fusion_params(model).keys() < plain
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in plain)
    # A multiple of 16384 values is what NF4 can hold; keys and values here are not.
    fitting = A_LAYER - 2 if scheme == "nf4" else A_LAYER
    assert len(done.quantized) == 2 * fitting + (scheme != "nf4")
    assert done.kept["decoder.tok_embeddings.weight"] == "FusionEmbedding"
    assert (
        scheme != "nf4" or "[64, 128] is no multiple" in done.kept["decoder.layers.0.attn.k_proj.weight"]
    )
    assert describe(model)["decoder"].dtype == ", ".join(
        sorted([str(dtype).removeprefix("torch."), DTYPES[scheme]])
    )
    assert done.bytes_after < done.bytes_before * 0.6


ARCHS = {
    "cross_attention": {"every": 2},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHS)
def test_int8_moves_the_logits_of_no_step_by_two_percent(name, dtype):
    """Read with caches, token by token, as an answer is; the worst token, not the mean of all."""
    decoder = tiny_decoder(embed_dim=72, num_heads=6, num_kv_heads=2, intermediate_dim=131)
    model = fuse(decoder, TinyEncoder(), **ARCHS[name], fusion_trainable=False).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.mul_(30)  # features that outweigh the embeddings
    if name == "cross_attention":
        open_gates(model)
    tokens = text_with_image() if name == "placeholder" else text()
    options = {**given(dtype), "max_new_tokens": 11, "temperature": 0, "scores": "logits"}
    said, before = generate(model, tokens, **options)
    quantize(model, "int8_weight_only")
    again, after = generate(model, tokens, **options)
    same = (said == again)[:, 12:-1].cumprod(dim=1).bool()  # logits behind another token are others
    moved = (after - before).float()[..., :VOCAB].norm(dim=-1) / before.float()[..., :VOCAB].norm(dim=-1)
    assert same.float().mean() > 0.5
    assert 0 < moved[same].max() < 0.02


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_any_size_keep_their_precision_in_bf16(scheme, scale):
    """Small scales are where a library that clamps them loses its bits."""
    layer = nn.Linear(128, 128, bias=False).requires_grad_(False)
    layer.weight.mul_(scale)
    layer, x = layer.bfloat16(), (scale * torch.randn(11, 128)).bfloat16()
    expected = layer(x)
    quantize(layer, scheme)
    assert distance(layer(x).float(), expected.float()) < SCHEMES[scheme]


@pytest.mark.parametrize("scheme", ["int8_weight_only", "float8_weight_only", "nf4"])
def test_fusion_trains_over_a_quantized_base_as_over_the_base(scheme):
    def gradients(model):
        model(text(), **given()).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = make()
    reference = gradients(copy.deepcopy(model))
    quantize(model, scheme)
    found = gradients(model)
    assert found.keys() == reference.keys() == get_fusion_params(model).keys()
    whole = [torch.cat([g[name].flatten() for name in found]) for g in (found, reference)]
    assert distance(*whole) < 2 * SCHEMES[scheme]


def test_inference_mode_around_it_does_not_stay_in_the_weights():
    model = make()
    with torch.inference_mode():
        quantize(model, "int8_weight_only")
    model(text(), **given()).sum().backward()
    assert all(p.grad is not None for p in get_fusion_params(model).values())


def test_int8_dynamic_has_no_gradient_and_says_so():
    model = make()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"int8_dynamic has no gradient.*decoder\.tok_embeddings\.fusion"
    ):
        quantize(model, "int8_dynamic")
    assert same_state(before, model) and not quantized_names(model)
    set_trainable(model, fusion=False)
    quantize(model, "int8_dynamic")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generates_as_before(scheme):
    model = make(fusion_trainable=False)
    quantize(model, scheme)
    tokens = generate(model, text(), **given(), max_new_tokens=3, temperature=0)
    assert tokens.shape == (2, 13 + 3)
    with torch.no_grad():
        for at in range(13, 16):
            # Without a cache: the same weights, another path.
            assert torch.equal(model(tokens[:, :at], **given())[:, -1].argmax(-1), tokens[:, at])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_artifacts_do_not_see_it(scheme, tmp_path):
    learned, fresh = make(fusion_trainable=False), make(fusion_trainable=False)
    with torch.no_grad():
        for p in get_fusion_params(learned).values():
            p.add_(0.1 * torch.randn_like(p))
    quantize(learned, scheme)
    quantize(fresh, scheme)
    save_fusion(learned, tmp_path)
    with torch.no_grad():
        assert not torch.equal(fresh(text(), **given()), learned(text(), **given()))
        assert not any(load_fusion(fresh, tmp_path))
        assert torch.equal(fresh(text(), **given()), learned(text(), **given()))
    assert not any(load_fusion(make(), tmp_path))  # over the base in high precision


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_checkpoints(scheme, tmp_path):
    model = make(fusion_trainable=False)
    quantize(model, scheme)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    plain, quantized = make(seed=7, fusion_trainable=False), make(seed=7, fusion_trainable=False)
    plain.load_state_dict(loaded, assign=True)
    quantize(quantized, scheme)
    quantized.load_state_dict(loaded)
    with torch.no_grad():
        expected = model(text(), **given())
        for other in (copy.deepcopy(model), plain, quantized):
            assert torch.equal(other(text(), **given()), expected)
            assert quantized_names(other) == quantized_names(model)


# PyTorch itself cannot unpickle a float8 tensor.
@pytest.mark.parametrize("scheme", sorted(SCHEMES.keys() - {"float8_weight_only"}))
def test_a_quantized_layer_can_be_pickled(scheme):
    layer, x = nn.Linear(128, 128).requires_grad_(False), torch.randn(3, 128)
    quantize(layer, scheme)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_parts_by_name():
    def quantized(*parts, **options):
        model = make(named=True, fusion_trainable=False)
        quantize(model, "int8_weight_only", parts=parts, **options)
        return {name.split(".layers")[0] for name in quantized_names(model)}

    assert quantized("encoder.eye") == {"encoders.eye"}
    assert quantized("encoder") == {"encoders.eye", "encoders.ear"}
    assert quantized("encoder.ear", "encoder") == {"encoders.eye", "encoders.ear"}
    assert quantized("encoder", "decoder") == {
        "encoders.eye",
        "encoders.ear",
        "decoder",
        "decoder.output.weight",
    }
    model = make(fusion_trainable=False)
    quantize(model, "int8_weight_only", parts="decoder", fusion=True)
    assert {n for n in get_fusion_params(model) if n.endswith("proj.weight")} < quantized_names(model)
    assert "decoder.output.fusion_linear.weight" in quantized_names(model)


def test_a_tied_head_and_its_table_stay():
    model = fuse(tiny_decoder(tied=True), TinyEncoder(), every=2, fusion_vocab_size=2, fusion_head=True)
    done = quantize(model, "int8_weight_only")
    assert len(done.quantized) == LAYERS * A_LAYER
    assert done.kept == {"decoder.tok_embeddings.weight": "FusionEmbedding, which the tied head reads"}
    assert str(done).splitlines()[1].endswith("which the tied head reads")


def test_a_weight_that_stands_twice_stands_twice_afterwards():
    model = nn.Sequential(nn.Linear(17, 17), nn.Linear(17, 17), nn.Embedding(5, 17), nn.Linear(17, 5))
    model.requires_grad_(False)
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    done = quantize(model, "int8_weight_only")
    assert done.quantized == ("0.weight",) and done.kept == {"2.weight": "Embedding"}
    assert model[1].weight is model[0].weight and model[3].weight is model[2].weight


class Halved(nn.Linear):
    def forward(self, input):
        return super().forward(input) / 2


def test_what_is_not_a_plain_layer_stays():
    from torchtune.modules.peft import LoRALinear

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(17, 5),
            "halved": Halved(17, 5),
            "conv": nn.Conv2d(3, 5, 2),
            "lora": LoRALinear(17, 5, rank=2, alpha=1.0),
            "attention": nn.MultiheadAttention(18, 3),
        }
    ).requires_grad_(False)
    done = quantize(model, "int8_weight_only")
    assert done.quantized == ("plain.weight",)
    assert done.kept == {
        "halved.weight": "Halved, which has a forward of its own",
        "conv.weight": "Conv2d, which is no nn.Linear",
        "lora.weight": "LoRALinear, which is no nn.Linear",
        "lora.lora_a.weight": "an adapter's",
        "lora.lora_b.weight": "an adapter's",
        "attention.in_proj_weight": "MultiheadAttention, which is no nn.Linear",
        "attention.out_proj.weight": ("NonDynamicallyQuantizableLinear, which has a forward of its own"),
    }


def test_a_tower_of_transformers():
    tower = HfEncoder(CLIPVisionModel(CLIPVisionConfig(**VISION)), keep_cls=True)
    model = fuse(tiny_decoder(), tower, every=2)
    images = {"pixel_values": torch.randn(2, 3, VISION["image_size"], VISION["image_size"])}
    with torch.no_grad():
        expected = model.encode(images)
        done = quantize(model, "int8_weight_only", parts="encoder")
        assert 0 < distance(model.encode(images), expected) < 0.02
    assert len(done.quantized) == 6 * VISION["num_hidden_layers"]


def refuse(match, model, scheme="int8_weight_only", **options):
    names, before = quantized_names(model), [id(p) for p in model.parameters()]
    with pytest.raises(ValueError, match=match):
        quantize(model, scheme, **options)
    assert quantized_names(model) == names and [id(p) for p in model.parameters()] == before


def test_scheme_and_parts_are_known_and_match_something():
    refuse(r"no scheme 'int3'; there are int8_weight_only.*no part 'eye'; the model has decoder, encoder\.",
           small(), "int3", parts=("eye",))  # fmt: skip
    refuse(r"no part 'fusion'", small(), parts="fusion")
    refuse(r"name a part \(decoder, encoder\)", small(), parts=())
    refuse(
        r"no part 'encoder'; the model has decoder\.",
        tiny_decoder().requires_grad_(False),
        parts="encoder",
    )
    small_encoder = small(fusion_trainable=False)
    refuse(r"encoder has no layer that int8_dynamic can hold: encoder\.layers\.0\.weight is kept, "
           r"\[11, 5\] is not wider than 16", small_encoder, "int8_dynamic",
           parts=("decoder", "encoder"))  # fmt: skip
    refuse(r"decoder has no layer that nf4 can hold.*; and 15 more", small(), "nf4")
    refuse(r"decoder has no layer .*: no matrix at all", nn.LayerNorm(5))


def test_weights_that_train_are_named():
    model = small(decoder_trainable=True)
    refuse(r"trains, which .*: decoder\.layers\.0\.attn\.q_proj\.weight.* and 14 more", model)
    model.requires_grad_(False)
    model.layers[2].mlp.w2.weight.requires_grad_(True)
    refuse(r"\): decoder\.layers\.2\.mlp\.w2\.weight$", model)


def test_twice_is_refused_and_quantized_weights_never_train():
    model = small()
    quantize(model, "int8_weight_only")
    refuse(r"quantized already: decoder\.layers\.0\.attn\.q_proj\.weight", model)
    refuse("quantized already", model, "nf4", parts=("encoder", "decoder"))
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"Quantized weights cannot train: decoder\.layers\.0.*and 14 more"
    ):
        set_trainable(model, decoder=True, fusion=False)
    assert [p.requires_grad for p in model.parameters()] == trains
    set_trainable(model, encoder=True)


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        decoder = nn.Linear(17, 5).requires_grad_(False)
    refuse(r"on the meta device \(load its values first\): weight", decoder)


def test_a_scheme_that_does_not_run_here_says_so_and_what_does(monkeypatch):
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

    model = small()

    def unsupported(*args, **kwargs):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(Float8Tensor, "from_hp", unsupported)
    refuse(
        r"float8_weight_only does not run on cpu in float32 \(RuntimeError: no kernel image\); there run "
        r"int8_weight_only, int8_dynamic, nf4$",
        model,
        "float8_weight_only",
    )
    quantize(model, "int8_weight_only")
    refuse(
        "int8_dynamic does not run on cpu in float64 .*; there run int8_weight_only, nf4$",
        nn.Linear(17, 5, dtype=torch.float64).requires_grad_(False),
        "int8_dynamic",
    )


def test_what_is_tried_first_draws_no_random_number():
    model = small()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    quantize(model, "int8_weight_only")
    assert torch.equal(torch.rand(3), expected)


def test_settings_of_the_process_stay():
    import torch._inductor.config as inductor

    before = (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision())
    for scheme in SCHEMES:
        quantize(nn.Linear(128, 128).requires_grad_(False), scheme)
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


def test_compiles_into_one_graph():
    model = fuse(tiny_decoder(num_layers=1), TinyEncoder(), every=1)
    open_gates(model).eval()
    quantize(model, "int8_weight_only")
    with torch.no_grad():
        expected = model(text(), **given())
        found = torch.compile(model, fullgraph=True)(text(), **given())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
