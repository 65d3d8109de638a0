"""What of modality-aware experts is a model's: which layers, what pads do, what comes back from disk."""

import copy

import pytest
import torch
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, state, text, tiny_decoder

from torchfuse import (
    MixtureFusionModel,
    from_pretrained,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    load_pretrained,
    param_groups,
    quantize,
    save_fusion,
    save_pretrained,
)
from torchfuse.data.masks import causal_mask, positions
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models import MoMaStrategy
from torchfuse.models.llama import llama_decoder
from torchfuse.modules.modality_experts import MoMaLayer, expert_load
from torchfuse.training import next_token_loss

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
LAYOUTS = {"prefix": {}, "placeholder": PLACEHOLDER}
TWO = {"eye": IMAGE, "ear": IMAGE + 1}


@torch.no_grad()
def move(model, scale=0.3):
    generator = torch.Generator().manual_seed(23)
    for parameter in get_fusion_params(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def fresh(layout="prefix", *, encoder=None, arch="moma", **options):
    return fuse(tiny_decoder(), encoder or TinyEncoder(), arch=arch, **{**LAYOUTS[layout], **options})


def prompt(layout, batch=2, length=13, start=2):
    tokens = text(batch, length)
    if layout == "placeholder":
        tokens[:, start : start + FEATURES] = IMAGE
    return tokens


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_copies_that_take_everything_by_halves_are_the_pretrained_feed_forward(layout, training):
    model = fresh(layout, num_experts=2, capacity=1.0, noise=False).train(training)
    for layer in model.strategy.fused_layers(model.decoder).values():
        torch.nn.init.zeros_(layer.fusion_layer.router("encoder").weight)  # a score of one half
    placement = LAYOUTS[layout] or {"placement": "prefix"}
    joint = fresh(arch="joint_decoder", **placement).train(training)
    call = {"encoder_input": inputs()}
    expected = joint(prompt(layout), **call)
    torch.testing.assert_close(model(prompt(layout), **call), expected, rtol=1e-6, atol=1e-6)


def rows_of_images():
    """Two images in a row, one in the middle, none, and a second encoder's among them."""
    tokens = text(4, 14)
    tokens[0, 1:7], tokens[0, 9:11] = IMAGE, IMAGE + 1
    tokens[1, 5:8], tokens[3, 2:5] = IMAGE, IMAGE
    tokens[3, 5:7] = IMAGE + 1
    eye = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    ear = torch.tensor([[1, 1], [0, 0], [0, 0], [1, 1]]).bool()
    return tokens, {"eye": inputs(4, 6), "ear": inputs(4, 2)}, {"eye": eye, "ear": ear}


def test_several_images_of_several_encoders_equal_their_rows_one_by_one():
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
    counts = {"eye": 3, "ear": 2}
    model = move(fresh("placeholder", encoder=encoders, encoder_token=TWO, num_experts=counts)).eval()
    tokens, given, masks = rows_of_images()
    together = model(tokens, encoder_input=given, encoder_mask=masks)
    load = expert_load(model)["decoder.layers.2"]
    assert {name: len(shares) for name, shares in load.items()} == counts
    assert any(0 < share < 1 for shares in load.values() for share in shares)
    for row in range(4):
        one = slice(row, row + 1)
        mine = {n: {"x": given[n]["x"][one][:, masks[n][row]]} for n in given if masks[n][row].any()}
        alone = model(tokens[one], encoder_input=mine)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_pad_competes_in_training(layout):
    options = {"num_text_experts": 3, "noise": False, "decoder_trainable": True}

    def learned(num_pads, pad_id=0):
        model = move(fresh(layout, pad_id=pad_id, **options))
        tokens = torch.nn.functional.pad(prompt(layout), (num_pads, 0))
        counts = torch.ones_like(tokens, dtype=torch.bool)
        counts[:, :num_pads] = False
        call = {"mask": causal_mask(counts), "input_pos": positions(counts), "encoder_input": inputs()}
        out = model(tokens, **call)[:, num_pads:]
        out.square().mean().backward()
        taken = {name: load["text"] for name, load in expert_load(model).items()}
        return out, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, taken

    plain, gradients, taken = learned(0)
    for num_pads in (1, 5):
        out, theirs, shares = learned(num_pads)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            if "tok_embeddings" not in name:
                torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert all(torch.equal(share, taken[name]) for name, share in shares.items())
    # Where the id of padding is not known, pads take the places of text.
    out, _, _ = learned(5, pad_id=None)
    assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)


def test_features_that_count_for_nothing_do_not_compete_in_training():
    model = move(fresh(noise=False))
    valid = torch.ones(2, FEATURES, dtype=torch.bool)
    valid[0, 3:] = False
    embeds = model.encode(inputs())
    other = torch.where(valid[..., None], embeds, 50 * torch.randn_like(embeds))
    outs = [model(text(), encoder_embeds=e, encoder_mask=valid) for e in (embeds, other)]
    assert torch.equal(*outs)
    load = expert_load(model)["decoder.layers.0"]["encoder"]
    assert load.tolist() == pytest.approx([3 / 10] * 4)  # a quarter of ten, rounded up


# --- generating ----------------------------------------------------------------------------------


def test_without_auxiliary_routers_it_refuses_to_generate_and_is_as_it_was():
    model = fresh(layers=[1], auxiliary_router=False).eval()
    kinds = [type(layer.attn) for layer in model.layers]
    with pytest.raises(ValueError, match="cannot generate: each chooses.*auxiliary_router=True"):
        generate(model, text(), encoder_input=inputs(), max_new_tokens=3)
    with pytest.raises(ValueError, match="cannot generate: each chooses"):
        model.setup_caches(2, torch.float32)
    assert not model.caches_are_setup()
    assert not any(layer.caches_are_setup() for layer in model.layers)
    assert [type(layer.attn) for layer in model.layers] == kinds
    takes_all = fresh(auxiliary_router=False, capacity=1.0)  # nothing to foretell
    assert generate(takes_all, text(), encoder_input=inputs(), max_new_tokens=3).shape == (2, 16)


def test_the_load_of_each_expert_is_known_after_a_step():
    model = fresh("placeholder", encoder_trainable=True, num_text_experts=2, pad_id=0)
    assert all(not share.any() for load in expert_load(model).values() for share in load.values())
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    tokens = prompt("placeholder", batch=3)
    loss, count = next_token_loss(
        model(tokens, encoder_input=inputs(3)), tokens.masked_fill(tokens == IMAGE, -100)
    )
    (loss / count).backward()
    optimizer.step()
    load = expert_load(model)
    assert list(load) == [f"decoder.layers.{i}" for i in range(3)]
    for shares in load.values():
        assert shares["encoder"].tolist() == pytest.approx([6 / 21] * 4)  # a quarter, rounded up
        assert shares["text"].tolist() == pytest.approx([9 / 18])  # half of 3 rows of 13 without 7


# --- building ------------------------------------------------------------------------------------


def fused(**options):
    return [isinstance(layer, MoMaLayer) for layer in fresh(**options).layers]


def test_which_layers_are_fused():
    assert fused() == [True, True, False]  # nobody reads features behind the last
    assert fused(layout="placeholder") == [True, True, True]
    assert fused(every=2) == [False, True, False]
    assert fused(layers=[0]) == [True, False, False]
    assert fused(layout="placeholder", layers=[2, 0]) == [True, False, True]
    model = fresh(num_experts=3, capacity=0.5, pad_id=7, start="zero")
    described = model.strategy.describe(model.decoder)
    assert described["layers"] == [0, 1]
    again = fresh(**described)
    assert again.strategy.describe(again.decoder) == described
    assert "pad_id" not in model.strategy.options()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 4}, "every=4 fuses no layer of this decoder, which has 3"),
        ({"every": 3}, r"Layer 2 is the last: where features stand in front.*now \[2\]"),
        ({"layers": [0, 2]}, r"Layer 2 is the last: .*now \[0, 2\].*placement=\"placeholder\""),
        ({"layers": [0, 3]}, "0 to 2, each once; got"),
        ({"num_experts": 0, "capacity": 2.0}, "num_experts must be at least 1, got 0; capacity must"),
        ({"num_experts": {"eye": 3}}, "num_experts must have the names of the modalities, encoder"),
        ({"start": "cold"}, "start must be 'warm' or 'zero', got 'cold'"),
        ({"placement": "placeholder"}, "needs encoder_token"),
        ({"experts": 3}, "architecture 'moma': unknown option 'experts'; it takes"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    decoder = tiny_decoder()
    before = [(name, id(module)) for name, module in decoder.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch="moma", **options)
    assert [(name, id(module)) for name, module in decoder.named_modules()] == before


def test_a_decoder_that_lacks_what_the_model_needs_is_refused():
    with pytest.raises(ValueError, match='no layer is a MoMaLayer.*arch="moma"'):
        MixtureFusionModel(tiny_decoder(), TinyEncoder(), strategy=MoMaStrategy())
    decoder = fresh().decoder
    with pytest.raises(ValueError, match="layer 0 has weights for encoder, not for eye; layer 1"):
        MixtureFusionModel(decoder, {"eye": TinyEncoder()}, strategy=MoMaStrategy())


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_artifact_holds_what_was_learned(layout, tmp_path):
    model, other = move(fresh(layout)).eval(), fresh(layout, start="zero", pad_id=0, noise=False).eval()
    save_fusion(model, tmp_path)
    load_fusion(other, tmp_path)
    given = {"encoder_input": inputs()}
    assert torch.equal(other(prompt(layout), **given), model(prompt(layout), **given))
    with pytest.raises(ValueError, match="placement '(prefix|placeholder)', the model's is"):
        load_fusion(fresh(next(name for name in LAYOUTS if name != layout)), tmp_path)
    save_fusion(fresh(layout, capacity=0.5), tmp_path / "half")
    with pytest.raises(ValueError, match="capacity 0.5, the model's is 0.3"):
        load_fusion(fresh(layout, capacity=0.3), tmp_path / "half")


def exportable(**options):
    torch.manual_seed(3)
    numbers = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 18, "intermediate_dim": 29}
    decoder = llama_decoder(vocab_size=VOCAB, num_layers=3, max_seq_len=53, **numbers)
    tower = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5)
    return fuse(decoder, tower, arch="moma", **options)


@pytest.mark.parametrize(
    "options",
    [{"layers": [0], "num_experts": 3, "pad_id": 0, "noise": False}, {**PLACEHOLDER, "capacity": 0.4}],
    ids=["prefix", "placeholder"],
)
def test_a_directory_holds_the_whole_model(options, tmp_path):
    model = move(exportable(**options)).eval()
    save_pretrained(model, tmp_path)
    other = from_pretrained(tmp_path).eval()
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.strategy.describe(other.decoder) == model.strategy.describe(model.decoder)
    tokens = text()
    if "encoder_token" in options:
        tokens[:, 1:10] = IMAGE
    call = {"encoder_input": {"images": torch.randn(2, 3, 12, 12)}}
    assert torch.equal(other(tokens, **call), model(tokens, **call))
    # How training goes may differ from what is loaded, how many experts choose may not.
    third = exportable(**{**options, "pad_id": 9, "noise": True, "start": "zero"}).eval()
    load_pretrained(third, tmp_path)
    assert torch.equal(third(tokens, **call), model(tokens, **call))
    fourth = exportable(**{**options, "capacity": 0.7})
    before = state(fourth)
    with pytest.raises(ValueError, match="capacity (None|0.4), the model has 0.7"):
        load_pretrained(fourth, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in fourth.state_dict().items())


def test_only_the_base_is_quantized():
    model = move(fresh(num_experts=2, num_text_experts=2)).eval()
    exact = model(text(), encoder_input=inputs())
    report = quantize(model, "int8_weight_only", parts=("decoder",))
    assert "decoder.layers.0.mlp.w2.weight" in report.quantized
    assert not any("fusion_layer" in name for name in report.quantized)
    assert all(type(p) is torch.nn.Parameter for p in get_fusion_params(model).values())
    out = model(text(), encoder_input=inputs())
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(
        generate(model, text(), encoder_input=inputs(), max_new_tokens=1, temperature=0)[:, -1],
        out[:, -1].argmax(-1),
    )
    quantized = tiny_decoder().requires_grad_(False)
    quantize(quantized, "int8_weight_only")
    with pytest.raises(ValueError, match="Layer 0 cannot be fused.*quantize after fusing"):
        fuse(quantized, TinyEncoder(), arch="moma")


def test_bf16_stays_bf16_and_copies_copy():
    model = fuse(tiny_decoder().bfloat16(), TinyEncoder(), arch="moma", **PLACEHOLDER).eval()
    assert {p.dtype for p in get_fusion_params(model.decoder).values()} == {torch.bfloat16}
    tokens = prompt("placeholder")
    out = model(tokens, encoder_input=inputs())
    assert out.shape == (2, 13, VOCAB)
    assert torch.equal(copy.deepcopy(model)(tokens, encoder_input=inputs()), out)
