"""Pixels and ids in, logits and labels out, of every architecture; every name is the fused model's."""

import copy

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import IMAGE, VOCAB, TinyEncoder, inputs, same_state, state, text, tiny_decoder
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchfuse import (
    describe,
    export,
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
from torchfuse.checkpoint.artifact.trained import load_trained, save_trained
from torchfuse.checkpoint.run.checkpoint import load_checkpoint, save_checkpoint
from torchfuse.encoders.frames import FrameEncoder, frame_features_mask, hide_padding
from torchfuse.encoders.registry import pixels_keyword
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.models import (
    AdapterConfig,
    FusedModel,
    ModelConfig,
    VisionEncoderConfig,
    VLMConfig,
    VLMWrapper,
    build_modality_strategy,
    build_vlm_wrapper,
    inner_transformer,
)
from torchfuse.models.builders import llama_clip
from torchfuse.modules.adapters.builtin import build_adapter
from torchfuse.naming import model_behind, unwrap
from torchfuse.params import FreezeSpec, FreezeStage, apply_freeze_specs
from torchfuse.training.loss import next_token_loss
from torchfuse.training.sharding import shard

ARCHS = {
    "cross_attention": {"arch": "cross_attention"},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
    "mot": {"arch": "mot"},
    "moma": {"arch": "moma", "num_experts": 2},
    "deepstack": {"arch": "deepstack"},
}
# So that it has layers to fuse; the others have theirs unless told.
EVERY = {"cross_attention": {"every": 1}}
SIDE, TOKENS = 8, 4  # four patches of an image
B, F = 3, 3
REAL = torch.tensor([[True, True, False], [True, False, True], [False] * 3])


class Patches(nn.Module):
    """Images, or several a row, as four patches each."""

    feature_dim, num_tokens = 11, TOKENS

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(3 * 16, 11)])

    def forward(self, pixel_values):
        x = pixel_values.unfold(-2, 4, 4).unfold(-2, 4, 4)  # [..., 3, 2, 2, 4, 4]
        x = x.movedim(-5, -3).flatten(-3).flatten(1, -2)
        return torch.tanh(self.layers[0](x))

    def example_input(self):
        return {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}


def strategy_of(name):
    return build_modality_strategy(**ARCHS[name])


@torch.no_grad()
def opened(model):
    """New weights that are nobody's copies, gates that are open."""
    generator = torch.Generator().manual_seed(23)
    for parameter in get_fusion_params(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def adapter():
    torch.manual_seed(5)
    return build_adapter("linear", 11, 18)


def make(name, **options):
    options = {**EVERY.get(name, {}), "encoder_trainable": True, **options}
    parts = Patches(), adapter(), tiny_decoder()
    torch.manual_seed(31)
    return opened(VLMWrapper(*parts, strategy_of(name), **options))


def fused(name, **options):
    options = {**EVERY.get(name, {}), "encoder_trainable": True, **ARCHS[name], **options}
    encoder, projection, decoder = Patches(), adapter(), tiny_decoder()
    torch.manual_seed(31)
    return opened(fuse(decoder, encoder, adapter=projection, **options))


def pixels(frames=None, batch=B, seed=7):
    shape = (batch, *([] if frames is None else [frames]), 3, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(name, features=TOKENS, batch=B, length=17):
    """Text; with as many placeholders in front as each row has features."""
    tokens = text(batch, length)
    if name == "placeholder":
        at = (torch.arange(length) - 1).expand(batch, -1)
        tokens[(at >= 0) & (at < torch.as_tensor(features).reshape(-1, 1))] = IMAGE
    return tokens


# --- the call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_is_the_fused_model_to_the_bit_and_labels_come_back(name):
    model, plain = make(name).eval(), fused(name).eval()
    tokens = ids(name)
    logits, labels = model(pixels(), tokens, tokens)
    assert labels is tokens
    assert torch.equal(logits, plain(tokens, encoder_input={"pixel_values": pixels()}))
    assert logits.shape == (B, 17, VOCAB)
    assert not torch.allclose(model(pixels(seed=8), tokens)[0], logits)
    text_alone, none = model(None, text())
    assert none is None
    assert torch.equal(text_alone, tiny_decoder()(text()))
    assert torch.equal(model(tokens=text()), text_alone)


def test_labels_are_shifted_by_the_loss_and_by_nobody_else():
    model, tokens = make("prefix"), text()
    logits, labels = model(pixels(batch=2), tokens, tokens)
    total, count = next_token_loss(logits, labels)
    by_hand = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(total, by_hand)
    assert int(count) == 2 * 12
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    other, _ = model(pixels(batch=2), changed)
    assert torch.equal(other[:, :6], logits[:, :6])  # 0 .. 5 score 1 .. 6
    assert not torch.allclose(other[:, 6], logits[:, 6])


@pytest.mark.parametrize("padding", [0.7, float("nan")], ids=str)
@pytest.mark.parametrize("name", ARCHS)
def test_padded_frames_are_seen_by_nobody(name, padding):
    model, plain = make(name).eval(), fused(name).eval()
    tokens, clips = ids(name, REAL.sum(dim=1) * TOKENS), pixels(F)
    logits, _ = model(clips, tokens, frame_mask=REAL)
    given = {
        "encoder_input": {"pixel_values": hide_padding(clips, REAL)},
        "encoder_mask": frame_features_mask(REAL, TOKENS),
    }
    assert torch.equal(logits, plain(tokens, **given))
    other = clips.clone()
    other[~REAL] = padding
    assert torch.equal(model(other, tokens, frame_mask=REAL)[0], logits)
    other[0, 1] += 1
    assert not torch.allclose(model(other, tokens, frame_mask=REAL)[0][0], logits[0])
    torch.testing.assert_close(logits[2:], model(None, tokens[2:])[0], rtol=1e-4, atol=1e-5)
    for row in range(2):
        frames = clips[row][REAL[row]][None]
        alone, _ = model(frames, tokens[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_calls_that_do_not_fit_are_named():
    model = make("prefix", num_frames=2)
    with pytest.raises(
        ValueError, match=r"frame_mask goes with clips, .* got pixel_values \[3, 3, 8, 8\]"
    ):
        model(pixels(), text(B), frame_mask=REAL)
    with pytest.raises(ValueError, match="frame_mask goes with clips, .* got pixel_values None"):
        model(None, text(B), frame_mask=REAL)
    with pytest.raises(ValueError, match="Clips have 2 frames at most here, got 3"):
        model(pixels(F), text(B), frame_mask=REAL)
    with pytest.raises(ValueError, match=r"frame_mask must be bool .* shape \[b, f\]"):
        make("prefix")(pixels(F), text(B), frame_mask=REAL[:2])
    with pytest.raises(
        ValueError, match="called with pixel_values and input_ids, .* or as a decoder is"
    ):
        model(pixels())
    with pytest.raises(ValueError, match="there are labels and frame_mask; got mask, input_pos, which"):
        model(pixels(), text(B), mask=None, input_pos=None)
    with pytest.raises(ValueError, match="of 'encoder' have 3 rows, the tokens 2"):
        model(pixels(), text(2))
    odd = VLMWrapper(TinyEncoder(), "linear", tiny_decoder(), strategy_of("prefix"))
    odd.fused.encoder.forward = lambda x: torch.zeros(3, 4, 11)  # four features of three frames
    with pytest.raises(ValueError, match="4 features of 3 frames are not equally many"):
        odd(pixels(F), text(B), frame_mask=REAL)


def test_what_does_not_fit_changes_nothing():
    decoder = tiny_decoder()
    before = state(decoder)
    with pytest.raises(ValueError, match="one vision encoder without a name, got dict"):
        VLMWrapper({"eye": Patches()}, "linear", decoder, strategy_of("mot"))
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        VLMWrapper(Patches(), "linear", decoder, strategy_of("mot"), num_frames=0)
    with pytest.raises(ValueError, match="every=9 fuses no layer"):
        VLMWrapper(Patches(), "linear", decoder, strategy_of("mot"), every=9)
    named = fuse(tiny_decoder(), {"eye": Patches()}, arch="mot")
    with pytest.raises(ValueError, match="without a name, got encoders by name"):
        VLMWrapper.around(named)
    assert same_state(before, decoder)


def test_the_keyword_of_pixels_is_the_encoders():
    assert pixels_keyword(Patches()) == "pixel_values"
    assert pixels_keyword(TinyEncoder()) == "x"
    assert pixels_keyword(checkpoint_wrapper(torch.compile(Patches()))) == "pixel_values"

    class Keywords(nn.Module):
        def forward(self, **inputs):
            return inputs["pixel_values"]

    with pytest.raises(ValueError, match="Which keyword of Keywords takes pixels is not known"):
        pixels_keyword(Keywords())
    silent = Keywords()
    silent.example_input = lambda: {"pixel_attention_mask": 1, "pixel_values": 2}
    assert pixels_keyword(silent) == "pixel_values"


# --- how many positions an image takes -----------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_num_image_tokens(name):
    expected = 0 if name == "cross_attention" else TOKENS
    assert make(name).num_image_tokens == expected
    assert make(name, num_frames=5).num_image_tokens == 5 * expected
    pooled = build_adapter("avgpool", 11, 18, num_tokens=TOKENS, window=2)
    parts = Patches(), pooled, tiny_decoder(), strategy_of(name)
    model = VLMWrapper(*parts, num_frames=3, **EVERY.get(name, {}))
    assert model.num_image_tokens == 3 * (expected // 4)
    if name not in ("cross_attention", "placeholder"):
        seen = []
        model.layers[0].register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
        model(pixels(3), text(B))
        assert seen == [13 + model.num_image_tokens]


def test_image_tokens_of_several_encoders_add_up():
    encoders = {"eye": RandomEncoder(5, 11), "ear": RandomEncoder(3, 7)}
    model = fuse(tiny_decoder(), encoders, arch="mot")
    assert model.strategy.num_image_tokens(model, 2) == 2 * (5 + 3)


def test_unknown_numbers_of_image_tokens_are_refused():
    model = VLMWrapper(TinyEncoder(), "linear", tiny_decoder(), strategy_of("prefix"))
    with pytest.raises(ValueError, match=r"encoder 'encoder' \(TinyEncoder\) has no num_tokens"):
        _ = model.num_image_tokens
    model = VLMWrapper(Patches(), nn.Linear(11, 18), tiny_decoder(), strategy_of("prefix"))
    with pytest.raises(ValueError, match=r"adapter of 'encoder' \(Linear\) has no output_num_tokens"):
        _ = model.num_image_tokens
    silent = VLMWrapper(TinyEncoder(), "linear", tiny_decoder(), strategy_of("cross_attention"), every=1)
    assert silent.num_image_tokens == 0


# --- names, parts, what works through it ---------------------------------------------------------


def test_attributes_are_the_fused_models():
    model = make("mot")
    parts = model.fused
    assert isinstance(parts, FusedModel)
    assert model.vision_encoder is parts.encoder
    assert model.transformer is parts.decoder
    assert model.adapter is parts.adapter
    assert model.strategy is parts.strategy == strategy_of("mot")
    assert list(model.parts()) == ["decoder", "encoder"]
    model.output_hidden_states = [1]
    assert parts.decoder.output_hidden_states == [1]
    model.output_hidden_states = []
    other = Patches()
    model.vision_encoder = other
    assert parts.encoder is other
    assert list(model._modules) == ["fused"]
    assert not hasattr(model, "no_such_thing")
    around = VLMWrapper.around(fused("mot"), num_frames=2)
    assert list(around.state_dict()) == list(model.state_dict()) == list(parts.state_dict())


@pytest.mark.parametrize("name", ARCHS)
def test_names_are_the_fused_models(name):
    model, plain = make(name), fused(name)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(get_fusion_params(model)) == list(get_fusion_params(plain))
    assert list(get_model_state_dict(model)) == list(get_model_state_dict(plain))
    plain.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    model.load_state_dict(plain.state_dict())
    assert same_state(state(plain), model)


def fused_view(*, train_base, seed=0, **options):
    return VLMWrapper(
        TinyEncoder(),
        "mlp_2layer",
        tiny_decoder(seed, tied=True),
        build_modality_strategy("cross_attention", **options),
        every=2,
        fusion_vocab_size=2,
        decoder_trainable=train_base,
        encoder_trainable=train_base,
        on_missing="participate",
    )


CASES = [
    (wrap, view)
    for wrap in views.WRAPPERS
    for view in (
        [views.view_state_dict, views.view_dcp_model] if wrap is views.compiled else views.VIEWS
    )
]


@pytest.mark.parametrize(("wrap", "view"), CASES, ids=lambda f: f.__name__.removeprefix("view_"))
def test_names_in_every_view(wrap, view, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(views, "fused_model", fused_view)
    model = fused_view(train_base=view is not views.view_ignore_frozen)
    view(wrap(model), wrap(tiny_decoder(tied=True)))


@pytest.mark.parametrize("name", ARCHS)
def test_artifacts_are_shared_with_the_fused_model(name, tmp_path):
    model, other = make(name), fused(name)
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.mul_(1.1)
    save_fusion(model, tmp_path / "from_wrapper")
    assert not any(load_fusion(other, tmp_path / "from_wrapper"))
    assert same_state(state(model), other)
    save_fusion(other, tmp_path / "from_fused")
    fresh = make(name)
    assert not any(load_fusion(fresh, tmp_path / "from_fused"))
    assert same_state(state(other), fresh)


# --- what takes a fused model takes the wrapper ----------------------------------------------------

FACES = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "checkpointed": checkpoint_wrapper,
    "both": lambda model: torch.compile(checkpoint_wrapper(model), backend="eager"),
}
FORMATS = {
    "torchfuse": {"every": 2},
    "llava": {"arch": "joint_decoder", "encoder_token": VOCAB - 1},
}


def known_parts(seed=0, **options):
    """A model of parts that every format can describe."""
    torch.manual_seed(seed)
    return llama_clip(
        vocab_size=VOCAB,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        embed_dim=24,
        max_seq_len=61,
        intermediate_dim=41,
        tie_word_embeddings=False,
        image_size=12,
        patch_size=4,
        vision_embed_dim=20,
        vision_num_layers=3,
        vision_num_heads=5,
        vision_hidden_dim=43,
        **options,
    )


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("format_", FORMATS)
def test_directories_are_shared_with_the_fused_model(format_, face, tmp_path):
    model = known_parts(**FORMATS[format_])
    export(FACES[face](VLMWrapper.around(model)), tmp_path / "wrapper", format=format_)
    export(model, tmp_path / "fused", format=format_)
    assert "model.safetensors" in files_in(tmp_path / "wrapper")
    assert files_in(tmp_path / "wrapper") == files_in(tmp_path / "fused")
    again = from_pretrained(tmp_path / "wrapper")
    assert isinstance(again, FusedModel)
    assert same_state(state(model), again)
    other = known_parts(seed=3, **FORMATS[format_])
    assert not same_state(state(model), other)
    load_pretrained(FACES[face](VLMWrapper.around(other)), tmp_path / "fused")
    assert same_state(state(model), other)
    images = torch.randn(2, 3, 12, 12)
    tokens = ids("prefix", batch=2)
    if format_ == "llava":
        tokens[:, 2:11] = VOCAB - 1
    logits, _ = VLMWrapper.around(again).eval()(images, tokens)
    assert torch.equal(logits, model.eval()(tokens, encoder_input={"images": images}))


@pytest.mark.parametrize("face", FACES)
def test_what_takes_a_fused_model_takes_the_wrapper(face, tmp_path):
    def both(seed=0):
        trainable = {"decoder_trainable": True, "encoder_trainable": True}
        models = [known_parts(seed, every=2, **trainable) for _ in range(2)]
        return FACES[face](VLMWrapper.around(models[0])), *models

    model, inside, plain = both()
    assert model_behind(model) is inside
    assert str(describe(model)) == str(describe(plain))
    save_trained(model, tmp_path / "trained_wrapper")
    save_trained(plain, tmp_path / "trained")
    assert files_in(tmp_path / "trained_wrapper") == files_in(tmp_path / "trained")
    other, inside_other, fresh = both(seed=3)
    load_trained(other, tmp_path / "trained")
    load_trained(fresh, tmp_path / "trained_wrapper")
    assert same_state(state(fresh), inside_other)
    run = save_checkpoint(tmp_path / "run", model, optimizer_of(model), step=3)
    _, inside_other, fresh = both(seed=5)
    load_checkpoint(run.path, fresh, optimizer_of(fresh))
    assert same_state(state(inside), fresh)
    other = FACES[face](VLMWrapper.around(inside_other))
    load_checkpoint(run.path, other, optimizer_of(other))
    assert same_state(state(inside), inside_other)
    for each in (model, plain):
        each.requires_grad_(False)
    assert quantize(model, "int8_weight_only") == quantize(plain, "int8_weight_only")


def optimizer_of(model):
    return torch.optim.AdamW(param_groups(model, lr=1e-2))


def test_freeze_specs_and_modes():
    model = make("deepstack")
    apply_freeze_specs(model, [FreezeSpec("*", True), FreezeSpec("adapter", False)])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains == ["adapter.linear.weight", "adapter.linear.bias"]
    assert [g["name"] for g in param_groups(model, lr=1e-3)] == ["fusion"]
    model.train()
    assert model.training
    assert not model.vision_encoder.training
    assert not any(layer.training for layer in model.layers)
    assert model.adapter.training
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ARCHS)
def test_generates_as_the_fused_model(name):
    model, plain, tokens = make(name), fused(name), ids(name, length=9)
    call = {"encoder_input": {"pixel_values": pixels()}, "max_new_tokens": 5, "temperature": 0}
    said = generate(model, tokens, **call)
    assert torch.equal(said, generate(plain, tokens, **call))
    logits, _ = model.eval()(pixels(), said[:, :-1])
    assert torch.equal(logits[:, -1].argmax(-1), said[:, -1])


@pytest.mark.parametrize("name", ["cross_attention", "prefix", "mot"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model, tokens = make(name), ids(name, REAL.sum(dim=1) * TOKENS)
    called = torch.compile(model, backend="aot_eager", fullgraph=True)
    for given in ({}, {"frame_mask": REAL}):
        expected, _ = model(pixels(F), tokens, **given)
        out, labels = called(pixels(F), tokens, tokens, **given)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, tokens)


def test_inner_transformer():
    model = make("mot")
    decoder = model.fused.decoder
    for wrapped in (
        model,
        model.fused,
        decoder,
        torch.compile(model),
        checkpoint_wrapper(model),
        torch.compile(checkpoint_wrapper(model)),
        nn.DataParallel(model),
    ):
        assert inner_transformer(wrapped) is decoder
    model.transformer = checkpoint_wrapper(decoder)
    assert inner_transformer(torch.compile(model)) is decoder
    assert inner_transformer(torch.compile(other := nn.Linear(2, 3))) is other
    assert inner_transformer(copy.deepcopy(make("mot"))) is not decoder


def step(rank, name):
    # One rank has a clip, the other has none.
    frame_mask = REAL[:2]
    calls = [
        (pixels(F, 2), ids(name, frame_mask.sum(dim=1) * TOKENS, 2), None, frame_mask),
        (None, text(2, 17)),
    ]
    alone = make(name)
    losses = [next_token_loss(alone(*call)[0], text(2, 17))[0] for call in calls]
    (sum(losses) / 2).backward()
    model = make(name, on_missing="participate")
    shard(model)
    assert inner_transformer(model) is unwrap(model).fused.decoder
    loss, _ = next_token_loss(model(*calls[rank])[0], text(2, 17))
    torch.testing.assert_close(loss, losses[rank], rtol=1e-6, atol=1e-6)
    loss.backward()
    expected = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = parameter.grad.full_tensor()
            torch.testing.assert_close(
                whole, expected[parameter_name], rtol=1e-5, atol=1e-6, msg=parameter_name
            )
    full = StateDictOptions(full_state_dict=True)
    assert list(get_model_state_dict(model, options=full)) == list(alone.state_dict())
    call = {"max_new_tokens": 3, "temperature": 0}
    said = generate(model, text(2, 9), **call)
    assert torch.equal(said, generate(alone, text(2, 9), **call))
    distributed.barrier()


def sharded(rank, folder):
    for name in ("cross_attention", "prefix", "mot", "deepstack"):
        torch.manual_seed(17)
        step(rank, name)
    model = VLMWrapper.around(known_parts(every=2, on_missing="participate"))
    shard(model)
    model(torch.randn(2, 3, 12, 12), text())
    save_pretrained(model, folder)
    if rank == 0:
        assert same_state(state(known_parts(every=2)), from_pretrained(folder))
    distributed.barrier()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path):
    run_on_ranks(sharded, str(tmp_path / "saved"))


# --- configurations ------------------------------------------------------------------------------

MODEL = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "embed_dim": 18,
    "max_seq_len": 31,
    "intermediate_dim": 29,
}
VISION = {"type": "random", "num_tokens": 4, "feature_dim": 11}


def build(vlm, **sections):
    return build_vlm_wrapper(
        sections.get("model", MODEL),
        sections.get("vision", VISION),
        sections.get("adapter", {"type": "linear"}),
        vlm,
    )


@pytest.mark.parametrize("name", ARCHS)
def test_every_architecture_is_built_from_configurations(name):
    flat = {**ARCHS[name], **EVERY.get(name, {}), "max_text_len": 13}
    model = build(flat)
    assert model.strategy == strategy_of(name)
    options = {key: value for key, value in ARCHS[name].items() if key != "arch"}
    typed = build_vlm_wrapper(
        ModelConfig(**MODEL),
        VisionEncoderConfig(**VISION),
        AdapterConfig("linear"),
        VLMConfig(ARCHS[name]["arch"], options, max_text_len=13, **EVERY.get(name, {})),
    )
    assert typed.strategy == model.strategy
    assert list(typed.state_dict()) == list(model.state_dict())
    logits, labels = model(pixels(batch=2), tokens := ids(name, batch=2), tokens)
    assert logits.shape == (2, 17, VOCAB)
    assert labels is tokens
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(get_fusion_params(model))


def test_options_may_stand_in_both_places():
    model = build({"arch": "mot", "options": {"start": "zero"}, "layers": [0]})
    assert (model.strategy.start, model.strategy.layers) == ("zero", [0])


def test_what_else_a_model_takes_comes_from_the_configuration():
    more = {"fusion_vocab_size": 2, "on_missing": "participate", "every": 2}
    model = build({"arch": "mot", **more}, vision={**VISION, "num_frames": 3})
    assert model.tok_embeddings.fusion_embedding.weight.shape == (2, 18)
    assert model.on_missing == "participate"
    assert [hasattr(layer, "fusion_layer") for layer in model.layers] == [False, True]
    assert (model.num_frames, model.num_image_tokens) == (3, 12)
    plain = build({"arch": "mot"})
    assert plain.on_missing == "skip"
    assert not any("fusion_embedding" in name for name in get_fusion_params(plain))
    assert all(hasattr(layer, "fusion_layer") for layer in plain.layers)


def test_what_trains_is_as_the_configuration_says():
    stages = [{"start_step": 3, "specs": [{"module": "decoder", "frozen": False}]}]
    config = VLMConfig(
        "mot",
        freeze=[FreezeSpec("fusion", True), {"module": "adapter", "frozen": False}],
        freeze_schedule=stages,
    )
    model = build(config)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ["adapter.linear.weight", "adapter.linear.bias"]
    assert config.schedule.apply(model, 3)
    assert model.transformer.tok_embeddings.weight.requires_grad
    staged = VLMConfig("mot", freeze_schedule=[FreezeStage(0, (FreezeSpec("encoder", True),))])
    assert [stage.start_step for stage in staged.schedule] == [0]
    with pytest.raises(ValueError, match="stage at step 0: 'encodr' matches no parameter"):
        build(VLMConfig("mot", freeze=[FreezeSpec("encodr", True)]))
    with pytest.raises(ValueError, match="Nothing trains from step 5 on"):
        build(VLMConfig("mot", freeze_schedule=[FreezeStage(5, (FreezeSpec("*", True),))]))


@pytest.mark.parametrize(
    ("vlm", "sections", "complaint"),
    [
        ({"arch": "mtt"}, {}, "vlm: Unknown architecture 'mtt'; there are cross_attention, deepst"),
        ({"options": {}}, {}, "vlm: missing option 'arch'; it takes arch, options, max_text_len"),
        ({"arch": 3}, {}, "vlm: arch must be a string, got 3"),
        (5, {}, "vlm must be a VLMConfig or a mapping of its fields, got 5"),
        (
            {"arch": "mot", "qk_norm": True},
            {},
            "'mot': unknown option 'qk_norm'; it takes placement, encoder_token, layers, start. Got "
            ".'qk_norm': True.*Beside them a vlm has arch, options, max_text_len",
        ),
        ({"arch": "mot", "start": "cold"}, {}, "start must be 'warm' or 'zero', got 'cold'"),
        ({"arch": "moma", "capacity": 2.0}, {}, r"capacity must lie in \(0, 1\], got 2\.0"),
        ({"arch": "mot", "max_text_len": 0}, {}, "max_text_len must be at least 1, got 0"),
        ({"arch": "mot", "every": 5}, {}, "every=5 fuses no layer of this decoder, which has 2"),
        (
            {"arch": "mot", "freeze": [{"module": "encoder"}]},
            {},
            r"vlm\.freeze: missing option 'frozen'; it takes module, frozen",
        ),
        (
            {"arch": "mot", "freeze_schedule": [{"step": 3}]},
            {},
            "stage 0 must have the keys start_step and specs, got the keys step",
        ),
        (
            {"arch": "mot"},
            {"model": {**MODEL, "depth": 3}},
            "model: unknown option 'depth'; it takes vocab",
        ),
        (
            {"arch": "mot"},
            {"model": {**MODEL, "num_layers": 0, "embed_dim": -1}},
            "model: num_layers=0 must be at least 1; embed_dim=-1 must be at least 1",
        ),
        ({"arch": "mot"}, {"model": {**MODEL, "num_heads": 5}}, "num_heads=5 must divide embed_dim=18"),
        (
            {"arch": "mot"},
            {"vision": {"type": "vit"}},
            "vision_encoder: type must be one of clip, hf, .*random, siglip2, got 'vit'",
        ),
        (
            {"arch": "mot"},
            {"vision": {**VISION, "num_frames": 0, "options": {"num_tokens": 3}}},
            "num_frames must be at least 1, got 0; num_tokens must not stand in options, being said else",
        ),
        (
            {"arch": "mot"},
            {"vision": {**VISION, "options": {"sede": 3}}},
            "encoder 'random': unknown option 'sede'; it takes num_tokens, ",
        ),
        (
            {"arch": "mot"},
            {"adapter": {"type": "conv"}},
            "adapter: type must be one of attentional_pool, avgpool, linear, mlp_2layer, got 'conv'",
        ),
        (
            {"arch": "mot"},
            {"adapter": {"type": "linear", "options": {"in_dim": 3, "name": "x", "num_tokens": 4}}},
            "adapter: in_dim, name, num_tokens must not stand in options, being said elsewhere",
        ),
        (
            {"arch": "mot"},
            {"adapter": {"type": "mlp_2layer", "options": {"hidden_dim": 0}}},
            "mlp_2layer: hidden_dim=0 must be at least 1",
        ),
        (
            {"arch": "mot"},
            {"vision": {**VISION, "options": {"name": "clip"}}},
            "vision_encoder: name must not stand in options, being said elsewhere",
        ),
        (
            {"arch": "mot", "options": None, "start": "zero"},
            {},
            "vlm: options must be a mapping, got None",
        ),
        (
            {"arch": "mot", "options": {"start": "warm"}, "start": "zero"},
            {},
            "vlm: start must not stand in options, being said elsewhere; got .*'start': 'zero'",
        ),
        ({"arch": "mot", "options": {"arch": "moma"}}, {}, "vlm: arch must not stand in options"),
        ({"arch": "mot", "options": {3: "warm"}}, {}, "'mot': unknown option '3'; it takes placement"),
        ({"arch": "mot", "every": 0}, {}, "vlm: every must be at least 1, got 0"),
        ({"arch": "deepstack", "every": 0}, {}, "vlm: every must be at least 1, got 0"),
        ({"arch": "mot", "fusion_vocab_size": -1}, {}, "fusion_vocab_size must be at least 0, got -1"),
        (
            {"arch": "cross_attention", "norm_eps": -1.0},
            {},
            r"norm_eps=-1\.0 must be a finite number gre",
        ),
        (
            {"arch": "mot"},
            {"model": {**MODEL, "norm_eps": -1.0, "rope_base": 0.0, "rope_scale_factor": float("nan")}},
            r"model: norm_eps=-1\.0 must be finite and more than 0; rope_base=0\.0 must .*_factor=nan must",
        ),
        ({"arch": "mot"}, {"model": {**MODEL, "head_dim": 5}}, "head_dim=5 must be even, as the rotary"),
        (
            {"arch": "mot"},
            {"model": {**MODEL, "num_heads": 2}},
            "head_dim=9 must be even, as the rotary",
        ),
        (
            {"arch": "mot"},
            {"adapter": {"type": "linear", "options": {"window": 2}}},
            "adapter 'linear': unknown option 'window'; it takes none",
        ),
    ],
    ids=lambda given: None if isinstance(given, dict) else str(given)[:20],
)
def test_key_value_and_choices_are_named(vlm, sections, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(vlm, **sections)


@pytest.mark.parametrize(
    ("kind", "given", "complaint"),
    [
        (VLMConfig, {"arch": "mot", "options": None}, "vlm: options must be a mapping, got None"),
        (VLMConfig, {"arch": "mot", "freeze": None}, "vlm: freeze must be a list, got None"),
        (VLMConfig, {"arch": "mot", "freeze": "encoder"}, "vlm: freeze must be a list, got 'encoder'"),
        (
            VLMConfig,
            {"arch": "mot", "on_missing": "wait"},
            "must be 'skip' or 'participate', got 'wait'",
        ),
        (
            VLMConfig,
            {"arch": ["mot"], "max_text_len": "4", "every": True},
            r"vlm: arch must be a string, got \['mot'\]; max_text_len must be an integer or null, got '4'; "
            "every must be an integer or null, got True",
        ),
        (
            VisionEncoderConfig,
            {"type": "random", "num_tokens": "4", "num_frames": 2.0},
            r"vision_encoder: num_tokens must be an integer or null, got '4'; num_frames .*, got 2\.0",
        ),
        (
            ModelConfig,
            {**MODEL, "vocab_size": "37", "tie_word_embeddings": "false", "norm_eps": True},
            "model: vocab_size must be an integer, got '37'; norm_eps must be a number, got True; "
            "tie_word_embeddings must be true or false, got 'false'",
        ),
        (
            AdapterConfig,
            {"type": "nope"},
            "adapter: type must be one of attentional_pool, .*, got 'nope'",
        ),
        (AdapterConfig, {"type": None}, "adapter: type must be a string, got None"),
        (AdapterConfig, {"options": [3]}, r"adapter: options must be a mapping, got \[3\]"),
    ],
    ids=lambda given: None if isinstance(given, dict | type) else str(given)[:30],
)
def test_configurations_made_in_python_are_checked_as_those_of_a_file(kind, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        kind(**given)


def test_an_encoder_that_says_other_numbers_is_named():
    numbers = {"image_size": 12, "patch_size": 4, "embed_dim": 10, "num_layers": 2, "num_heads": 5}
    tower = {"type": "clip", "options": numbers}
    assert build({"arch": "mot"}, vision=tower | {"num_tokens": 9}).num_image_tokens == 9
    with pytest.raises(
        ValueError, match="encoder 'clip': num_tokens is 5, the encoder's 9; feature_dim is 7, the enc"
    ):
        build({"arch": "mot"}, vision=tower | {"num_tokens": 5, "feature_dim": 7})


@pytest.mark.parametrize(
    ("arch", "most"), [("cross_attention", 31), ("joint_decoder", 31 - 12), ("mot", 31 - 12)]
)
def test_lengths_are_compared_at_configuration_and_at_build(arch, most, monkeypatch):
    vlm = {"arch": arch} | EVERY.get(arch, {"placement": "prefix"})
    clips = {**VISION, "num_frames": 3}
    assert build(vlm | {"max_text_len": most}, vision=clips)
    complaint = "max_seq_len 31 is shorter than " + (
        "32 text tokens = 32"
        if arch == "cross_attention"
        else r"3 frames x 4 tokens \+ 20 text tokens = 32"
    )
    tower = {
        "type": "clip",
        "num_frames": 3,
        "options": {
            "image_size": 8,
            "patch_size": 4,
            "embed_dim": 10,
            "num_layers": 2,
            "num_heads": 5,
        },
    }
    with pytest.raises(ValueError, match=complaint):  # only the encoder that was built says 4
        build(vlm | {"max_text_len": most + 1}, vision=tower)
    monkeypatch.setattr(VisionEncoderConfig, "build", lambda self: pytest.fail("built too early"))
    with pytest.raises(ValueError, match=complaint):
        build(vlm | {"max_text_len": most + 1}, vision=clips)
    pooled = {"type": "avgpool", "options": {"window": 2}}
    if arch != "cross_attention":
        with pytest.raises(
            ValueError, match=r"3 frames x 1 tokens \(4 before the adapter\) \+ 29 text tokens = 32"
        ):
            build(vlm | {"max_text_len": 29}, vision=clips, adapter=pooled)


def test_inputs_here_are_what_they_seem():
    assert inputs()["x"].shape[-1] == TinyEncoder().in_dim
    assert Patches()(pixels(F)).shape == (B, F * TOKENS, 11)
    one_by_one = [Patches()(pixels(F)[:, frame]) for frame in range(F)]
    assert torch.equal(Patches()(pixels(F)), torch.cat(one_by_one, dim=1))


def test_frames_that_an_encoder_asks_for_are_counted():
    encoder = FrameEncoder(Patches(), min_frames=2)
    model = VLMWrapper(encoder, adapter(), tiny_decoder(), strategy_of("mot")).eval()
    with pytest.raises(ValueError, match="at least 2 of its 3 frames real .* but row 2 has 0"):
        model(pixels(F), text(B), frame_mask=REAL)
    plain = VLMWrapper(Patches(), adapter(), tiny_decoder(), strategy_of("mot")).eval()
    both = [m(pixels(F)[:2], text(2), frame_mask=REAL[:2])[0] for m in (model, plain)]
    assert torch.equal(*both)
    for one_frame in (pixels(1), pixels()):
        with pytest.raises(ValueError, match="at least 2 frames, .* are 1 a row"):
            model(one_frame, text(B))


def test_what_goes_with_pixels_is_refused_in_a_decoders_call():
    model = make("mot")
    for given in ({"frame_mask": REAL}, {"labels": text(B)}):
        with pytest.raises(ValueError, match="labels and frame_mask may stand, or as a decoder is"):
            model(text(B), **given)
