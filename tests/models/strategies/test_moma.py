"""Models with modality-aware experts: fused layers, padding, evaluation, losses, directories."""

import pytest
import torch
from models.architectures import (
    LAYOUTS,
    TWO,
    call_with_images,
    equals_its_rows,
    llama_and_clip,
    move,
    only_the_base_is_quantized,
    prompt,
    refused,
    rows_of_images,
    two_encoders,
)
from support import FEATURES, IMAGE, TinyEncoder, inputs, same_state, state, text, tiny_decoder
from torchtune.generation import generate as generate_without_caches
from torchtune.training import set_activation_checkpointing

from torchfuse import (
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
from torchfuse.modules.experts.modality_experts import MoMaLayer, expert_load, scale_auxiliary_losses
from torchfuse.naming import canonical_name
from torchfuse.training.loss import next_token_loss


def fresh(layout="prefix", *, encoder=None, arch="moma", **options):
    return fuse(tiny_decoder(), encoder or TinyEncoder(), arch=arch, **{**LAYOUTS[layout], **options})


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


def test_every_modality_has_as_many_experts_as_are_given():
    counts = {"eye": 3, "ear": 2}
    options = {"encoder": two_encoders(), "encoder_token": TWO, "num_experts": counts}
    model = move(fresh("placeholder", **options)).eval()
    tokens, given, masks = rows_of_images()
    together = model(tokens, encoder_input=given, encoder_mask=masks)
    load = expert_load(model)["decoder.layers.2"]
    assert {name: len(shares) for name, shares in load.items()} == counts
    assert any(0 < share < 1 for shares in load.values() for share in shares)
    equals_its_rows(together, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_does_not_compete_in_training(layout):
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
        out, padded, shares = learned(num_pads)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            if "tok_embeddings" not in name:
                torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert all(torch.equal(share, taken[name]) for name, share in shares.items())
    # Without the id of padding, padding takes places of text.
    out, _, _ = learned(5, pad_id=None)
    assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)


def test_features_that_are_masked_out_do_not_compete_in_training():
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
    takes_all = fresh(auxiliary_router=False, capacity=1.0)  # there is no choice to predict
    assert generate(takes_all, text(), encoder_input=inputs(), max_new_tokens=3).shape == (2, 16)


def test_without_auxiliary_routers_it_refuses_evaluation():
    model, call = fresh(auxiliary_router=False, num_text_experts=2).eval(), {"encoder_input": inputs()}
    complaint = r"cannot be evaluated: each chooses.*auxiliary_router=True.*call model\.train\(\)"
    for run in (
        lambda: model(text(), **call),
        lambda: model(text()),
        lambda: generate_without_caches(model, text(), max_generated_tokens=2),
        lambda: torch.compile(model, backend="eager")(text(), **call),
    ):
        with pytest.raises(ValueError, match=complaint):
            run()
    assert not any(share.any() for load in expert_load(model).values() for share in load.values())
    model.train()(text(), **call).mean().backward()
    takes_all = fresh(auxiliary_router=False, capacity=1.0).eval()  # each token is for itself
    alone = torch.cat([takes_all(row[None]) for row in text()])
    torch.testing.assert_close(takes_all(text()), alone, rtol=1e-5, atol=1e-5)


def test_without_auxiliary_routers_another_part_trains_beside_frozen_experts():
    options = {"fusion_trainable": False, "encoder_trainable": True}
    model = fresh(auxiliary_router=False, **options).train()
    assert not model.layers[0].fusion_layer.training  # frozen, in a model that trains
    model(text(), encoder_input=inputs()).mean().backward()
    assert model.encoder.layers[0].weight.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_in_training_mode_are_refused_and_nothing_has_changed(layout):
    model, tokens = move(fresh(layout, num_text_experts=2)).eval(), prompt(layout)
    expected = model(tokens, encoder_input=inputs()).detach()
    slots = 13 + model.strategy.extra_tokens(FEATURES)
    model.setup_caches(2, torch.float32, decoder_max_seq_len=slots)
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()[:13].expand(2, -1, -1)
    call = {"mask": mask, "input_pos": torch.arange(13), "encoder_input": inputs()}
    complaint = r"in training mode each expert chooses.*Call model\.eval\(\)"
    with torch.no_grad():
        with pytest.raises(ValueError, match=complaint):
            model.train()(tokens, **call)
        with pytest.raises(ValueError, match=complaint):
            torch.compile(model, backend="eager")(tokens, **call)
        assert model.cache_state is None
        assert not any(layer.attn.kv_cache.size for layer in model.layers)
        torch.testing.assert_close(model.eval()(tokens, **call), expected, rtol=1e-5, atol=1e-5)
        model.reset_caches()
        frozen = model.requires_grad_(False).train()  # its layers stay in evaluation mode
        torch.testing.assert_close(frozen(tokens, **call), expected, rtol=1e-5, atol=1e-5)


def test_cached_steps_of_a_text_that_holds_the_id_of_padding():
    model, tokens = move(fresh(num_text_experts=2, pad_id=5)).eval(), text()
    tokens[:, 4] = 5
    expected = model(tokens, encoder_input=inputs()).detach()
    slots = FEATURES + 13
    model.setup_caches(2, torch.float32, decoder_max_seq_len=slots)
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()[:13].expand(2, -1, -1)
    for start, end in ((0, 10), (10, 13)):
        given = {"encoder_input": inputs()} if start == 0 else {}
        at = torch.arange(start, end)
        out = model(tokens[:, start:end], mask=mask[:, start:end], input_pos=at, **given)
        torch.testing.assert_close(out, expected[:, start:end], rtol=1e-5, atol=1e-5)


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


def test_with_labels_on_answers_alone_the_last_layers_image_experts_learn_nothing():
    model, tokens = fresh("placeholder", num_experts=2, noise=False), prompt("placeholder")
    labels = tokens.masked_fill(tokens == IMAGE, -100)

    def unmoved(labels):
        model.zero_grad()
        next_token_loss(model(tokens, encoder_input=inputs()), labels)[0].backward()
        return {name for name, p in get_fusion_params(model).items() if not p.grad.any()}

    answers = labels.clone()
    answers[:, :11] = -100
    last = [name for name in get_fusion_params(model) if "layers.2." in name]
    assert unmoved(answers) == {name for name in last if "auxiliary" not in name}
    assert not unmoved(labels)


def compile_layers(model):
    for layer in model.strategy.fused_layers(model.decoder).values():
        layer.compile(backend="aot_eager", fullgraph=True)


def checkpoint_layers(model):
    set_activation_checkpointing(model, {MoMaLayer})


WAYS = {"eager": lambda model: None, "compiled": compile_layers, "checkpointed": checkpoint_layers}


# Dynamo looks for gradients of the hidden states that a layer is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", WAYS)
def test_the_auxiliary_loss_of_a_step_does_not_depend_on_its_batches(way):
    torch._dynamo.reset()
    model = move(fresh("placeholder", layers=[1], num_experts=2, num_text_experts=2))
    WAYS[way](model)
    names = [name for name in get_fusion_params(model) if "auxiliary" in name]
    assert len(names) == 2 * 4  # of two modalities, two maps with biases

    def gradients(seeds, scale):
        model.zero_grad()
        scale_auxiliary_losses(model, scale)
        for seed in seeds:
            torch.manual_seed(seed)  # experts are chosen with noise
            model(prompt("placeholder"), encoder_input=inputs(seed=seed)).mean().backward()
        return {
            canonical_name(n): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }

    alone = [gradients([seed], 1) for seed in (5, 6, 7)]
    step = gradients([5, 6, 7], 1 / 3)
    assert step.keys() == get_fusion_params(model).keys()
    for name, gradient in step.items():
        added = sum(gradients[name] for gradients in alone)
        expected = added / 3 if name in names else added
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6, msg=name)
        assert name not in names or added.any(), name


def test_a_scale_is_a_number_from_zero_on_and_for_any_model():
    model = fresh()
    for scale in (-0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"must be 0 or more, and finite; got {scale}"):
            scale_auxiliary_losses(model, scale)
    experts = [layer.fusion_layer for layer in model.strategy.fused_layers(model.decoder).values()]
    assert [group.auxiliary_loss_scale for group in experts] == [1, 1]
    scale_auxiliary_losses(model, 0.25)
    assert [group.auxiliary_loss_scale for group in experts] == [0.25, 0.25]
    scale_auxiliary_losses(tiny_decoder(), 0.25)


# --- building ------------------------------------------------------------------------------------


def fused(**options):
    return [isinstance(layer, MoMaLayer) for layer in fresh(**options).layers]


def test_which_layers_are_fused():
    assert fused() == [True, True, False]  # features after the last layer are unused
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
        ({"every": 3}, r"Layer 2 is the last: with features in front.*now \[2\]"),
        ({"layers": [0, 2]}, r"Layer 2 is the last: .*now \[0, 2\].*placement=\"placeholder\""),
        ({"layers": [0, 3]}, "0 to 2, each once; got"),
        ({"num_experts": 0, "capacity": 2.0}, "num_experts must be at least 1, got 0; capacity must"),
        ({"num_experts": {"eye": 3}}, "num_experts must have the names of the modalities, encoder"),
        ({"start": "cold"}, "start must be 'warm' or 'zero', got 'cold'"),
        ({"experts": 3}, "architecture 'moma': unknown option 'experts'; it takes"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    refused("moma", options, complaint)


# --- what is kept --------------------------------------------------------------------------------


def test_an_artifact_of_another_capacity_is_refused(tmp_path):
    save_fusion(fresh(capacity=0.5), tmp_path)
    with pytest.raises(ValueError, match="capacity 0.5, the model's is 0.3"):
        load_fusion(fresh(capacity=0.3), tmp_path)


def exportable(**options):
    return fuse(*llama_and_clip(), arch="moma", **options)


def test_a_directory_may_differ_in_options_of_training_and_in_no_other(tmp_path):
    model = move(exportable(capacity=0.4)).eval()
    save_pretrained(model, tmp_path)
    other, call = (
        exportable(capacity=0.4, pad_id=9, noise=False, start="zero").eval(),
        call_with_images({}),
    )
    load_pretrained(other, tmp_path)
    assert torch.equal(other(**call), model(**call))
    third = exportable(capacity=0.7)
    before = state(third)
    with pytest.raises(ValueError, match="capacity 0.4, the model has 0.7"):
        load_pretrained(third, tmp_path)
    assert same_state(before, third)


def test_only_the_base_is_quantized():
    model = move(fresh(num_experts=2, num_text_experts=2)).eval()
    out = only_the_base_is_quantized(model)
    assert torch.equal(
        generate(model, text(), encoder_input=inputs(), max_new_tokens=1, temperature=0)[:, -1],
        out[:, -1].argmax(-1),
    )
    quantized = tiny_decoder().requires_grad_(False)
    quantize(quantized, "int8_weight_only")
    with pytest.raises(ValueError, match="Layer 0 cannot be fused.*quantize after fusing"):
        fuse(quantized, TinyEncoder(), arch="moma")
