"""The wrapper equals the fused model, under the same names, whatever is called on it."""

import copy

import pytest
import torch
from contract import views
from ranks import run_on_ranks
from support import IMAGE, VOCAB, TinyEncoder, same_state, state, text, tiny_decoder
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from torchfuse import (
    describe,
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
from torchfuse.checkpoint import load_checkpoint, save_checkpoint
from torchfuse.checkpoint.artifact.trained import load_trained, save_trained
from torchfuse.encoders.frames import FrameEncoder, frame_features_mask, hide_padding
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.models import VLMWrapper, build_modality_strategy, inner_transformer
from torchfuse.models.builders import llama_clip
from torchfuse.modules.adapters import build_adapter
from torchfuse.naming import unwrap
from torchfuse.params import FreezeSpec, apply_freeze_specs
from torchfuse.training import shard
from torchfuse.training.loss import next_token_loss

ARCHS = {
    "cross_attention": {"arch": "cross_attention"},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
    "mot": {"arch": "mot"},
    "moma": {"arch": "moma", "num_experts": 2},
    "deepstack": {"arch": "deepstack"},
}
every_arch = pytest.mark.parametrize("name", ARCHS)
SIDE, TOKENS, DIM = 8, 4, 11
B, F = 3, 3
REAL = torch.tensor([[True, True, False], [True, False, True], [False] * 3])


def strategy_of(name):
    return build_modality_strategy(**ARCHS[name])


def options_of(name):
    return {"every": 1} if name == "cross_attention" else {}


@torch.no_grad()
def moved(model):
    """New weights all different, and gates open."""
    generator = torch.Generator().manual_seed(23)
    for parameter in get_fusion_params(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def parts():
    torch.manual_seed(5)
    return RandomEncoder(TOKENS, DIM), build_adapter("linear", DIM, 18), tiny_decoder()


def make(name, **options):
    encoder, adapter, decoder = parts()
    torch.manual_seed(31)
    return moved(VLMWrapper(encoder, adapter, decoder, strategy_of(name), **options_of(name) | options))


def fused(name):
    encoder, adapter, decoder = parts()
    torch.manual_seed(31)
    return moved(fuse(decoder, encoder, adapter=adapter, **options_of(name), **ARCHS[name]))


def pixels(frames=None, batch=B, seed=7):
    shape = (batch, *([] if frames is None else [frames]), 3, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(name, features=TOKENS, batch=B, length=17):
    """Text; for placeholders, as many from position 1 on as each row has features."""
    tokens = text(batch, length)
    if name == "placeholder":
        at = (torch.arange(length) - 1).expand(batch, -1)
        tokens[(at >= 0) & (at < torch.as_tensor(features).reshape(-1, 1))] = IMAGE
    return tokens


# --- the call ------------------------------------------------------------------------------------


@every_arch
def test_equals_the_fused_model_in_values_and_names(name):
    model, plain = make(name).eval(), fused(name).eval()
    tokens = ids(name)
    logits, labels = model(pixels(), tokens, tokens)
    assert labels is tokens
    assert torch.equal(logits, plain(tokens, encoder_input={"images": pixels()}))
    assert not torch.allclose(model(pixels(seed=8), tokens)[0], logits)
    text_alone, none = model(None, text())
    assert none is None
    assert torch.equal(text_alone, tiny_decoder()(text()))
    assert torch.equal(model(tokens=text()), text_alone)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(get_fusion_params(model)) == list(get_fusion_params(plain))


@every_arch
def test_padded_frames_are_masked_out(name):
    model, plain = make(name).eval(), fused(name).eval()
    tokens, clips = ids(name, REAL.sum(dim=1) * TOKENS), pixels(F)
    expected = plain(
        tokens,
        encoder_input={"images": hide_padding(clips, REAL)},
        encoder_mask=frame_features_mask(REAL, TOKENS),
    )
    clips[~REAL] = float("nan")
    assert torch.equal(model(clips, tokens, frame_mask=REAL)[0], expected)


def test_frames_that_an_encoder_requires_are_counted():
    _, adapter, decoder = parts()
    encoder = FrameEncoder(RandomEncoder(TOKENS, DIM), min_frames=2)
    model = moved(VLMWrapper(encoder, adapter, decoder, strategy_of("mot"))).eval()
    with pytest.raises(ValueError, match="at least 2 of its 3 frames real .* but row 2 has 0"):
        model(pixels(F), text(B), frame_mask=REAL)
    both = [m(pixels(F)[:2], text(2), frame_mask=REAL[:2])[0] for m in (model, make("mot").eval())]
    assert torch.equal(*both)
    with pytest.raises(ValueError, match="at least 2 frames, .* are 1 a row"):
        model(pixels(1), text(B))


@pytest.mark.parametrize(
    ("args", "given", "complaint"),
    [
        ((pixels(), text(B)), {"frame_mask": REAL}, r"is for clips, .* pixel_values \[3, 3, 8, 8\]"),
        ((None, text(B)), {"frame_mask": REAL}, "frame_mask is for clips, .* pixel_values None"),
        ((pixels(F), text(B)), {}, "Clips must have at most 2 frames, got 3"),
        ((pixels(2), text(B)), {"frame_mask": REAL[:2]}, r"frame_mask must be bool .* shape \[b, f\]"),
        ((pixels(), text(B)), {"mask": None, "input_pos": None}, "got mask, input_pos, which the dec"),
        ((pixels(), text(2)), {}, "of 'encoder' have 3 rows, the tokens 2"),
        ((pixels(),), {}, "with pixel_values and input_ids, .* or as a decoder is with ids alone"),
        ((text(B),), {"frame_mask": REAL}, "with pixel_values and input_ids, .* or as a decoder is"),
        ((text(B),), {"labels": text(B)}, "with pixel_values and input_ids, .* or as a decoder is"),
    ],
)
def test_inputs_that_do_not_fit_are_named(args, given, complaint):
    with pytest.raises(ValueError, match=complaint):
        make("prefix", num_frames=2)(*args, **given)


@pytest.mark.parametrize(
    ("encoder", "adapter", "complaint"),
    [
        (TinyEncoder(), "linear", r"encoder 'encoder' \(TinyEncoder\) has no num_tokens"),
        (
            RandomEncoder(TOKENS, DIM),
            build_adapter("avgpool", DIM, 18, window=2),
            "3 frames x 4 tokens do not fit the adapter",
        ),
    ],
)
def test_a_frame_mask_needs_the_number_of_features(encoder, adapter, complaint):
    model = VLMWrapper(encoder, adapter, tiny_decoder(), strategy_of("prefix"))
    with pytest.raises(ValueError, match=complaint):
        model(pixels(F), text(B), frame_mask=REAL)


def test_parts_that_do_not_fit_are_unchanged():
    decoder = tiny_decoder()
    before = state(decoder)
    with pytest.raises(ValueError, match="one vision encoder without a name, got dict"):
        VLMWrapper({"eye": RandomEncoder(TOKENS, DIM)}, "linear", decoder, strategy_of("mot"))
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        VLMWrapper(RandomEncoder(TOKENS, DIM), "linear", decoder, strategy_of("mot"), num_frames=0)
    with pytest.raises(ValueError, match="every=9 fuses no layer"):
        VLMWrapper(RandomEncoder(TOKENS, DIM), "linear", decoder, strategy_of("mot"), every=9)
    with pytest.raises(ValueError, match="without a name, got encoders by name"):
        VLMWrapper.around(fuse(tiny_decoder(), {"eye": RandomEncoder(TOKENS, DIM)}, arch="mot"))
    assert same_state(before, decoder)


# --- how many positions an image takes -----------------------------------------------------------


@every_arch
def test_num_image_tokens_is_the_number_of_positions(name):
    expected = 0 if name == "cross_attention" else TOKENS
    assert make(name).num_image_tokens == expected
    pooled = build_adapter("avgpool", DIM, 18, num_tokens=TOKENS, window=2)
    strategy = strategy_of(name)
    model = VLMWrapper(
        RandomEncoder(TOKENS, DIM), pooled, tiny_decoder(), strategy, num_frames=3, **options_of(name)
    )
    assert model.num_image_tokens == 3 * (expected // 4)
    if name not in ("cross_attention", "placeholder"):
        lengths = []
        model.layers[0].register_forward_hook(lambda _, given, out: lengths.append(given[0].shape[1]))
        model(pixels(3), text(B))
        assert lengths == [13 + model.num_image_tokens]


def test_image_tokens_of_several_encoders_add_up():
    encoders = {"eye": RandomEncoder(5, 11), "ear": RandomEncoder(3, 7)}
    model = fuse(tiny_decoder(), encoders, arch="mot")
    assert model.strategy.num_image_tokens(model, 2) == 2 * (5 + 3)


def test_an_unknown_num_image_tokens_is_an_error_where_it_matters():
    model = VLMWrapper(TinyEncoder(), "linear", tiny_decoder(), strategy_of("prefix"))
    with pytest.raises(ValueError, match=r"encoder 'encoder' \(TinyEncoder\)"):
        _ = model.num_image_tokens
    model = VLMWrapper(
        RandomEncoder(TOKENS, DIM), nn.Linear(DIM, 18), tiny_decoder(), strategy_of("prefix")
    )
    with pytest.raises(ValueError, match=r"adapter of 'encoder' \(Linear\) has no output_num_tokens"):
        _ = model.num_image_tokens
    model = VLMWrapper(TinyEncoder(), "linear", tiny_decoder(), strategy_of("cross_attention"), every=1)
    assert model.num_image_tokens == 0


# --- attributes and names ------------------------------------------------------------------------


def test_attributes_are_the_fused_models():
    model = make("mot")
    inner = model.fused
    assert (model.vision_encoder, model.transformer) == (inner.encoder, inner.decoder)
    assert (model.adapter, model.strategy) == (inner.adapter, inner.strategy)
    assert list(model.parts()) == ["decoder", "encoder"]
    model.output_hidden_states = [1]
    assert inner.decoder.output_hidden_states == [1]
    other = RandomEncoder(TOKENS, DIM)
    model.vision_encoder = other
    assert inner.encoder is other
    assert list(model._modules) == ["fused"]
    assert not hasattr(model, "no_such_thing")


def wrapped_view(*, train_base, seed=0, **options):
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


@pytest.mark.parametrize("view", views.VIEWS, ids=lambda view: view.__name__.removeprefix("view_"))
def test_names_in_every_view(view, monkeypatch):
    monkeypatch.setattr(views, "fused_model", wrapped_view)
    model = wrapped_view(train_base=view is not views.view_ignore_frozen)
    view(model, tiny_decoder(tied=True))


def test_inner_transformer():
    model = make("mot")
    decoder = model.fused.decoder
    for wrapped in (model, model.fused, decoder, nn.DataParallel(model), all_around(model)):
        assert inner_transformer(wrapped) is decoder
    model.transformer = checkpoint_wrapper(decoder)
    assert inner_transformer(torch.compile(model, backend="eager")) is decoder
    assert inner_transformer(checkpoint_wrapper(other := nn.Linear(2, 3))) is other
    assert inner_transformer(copy.deepcopy(model)) is not decoder


# --- functions that take a fused model -----------------------------------------------------------


def all_around(model):
    return torch.compile(checkpoint_wrapper(model), backend="eager")


every_face = pytest.mark.parametrize("face", [lambda model: model, all_around], ids=["plain", "wrapped"])


def known_parts():
    """A model of parts that a directory can describe."""
    torch.manual_seed(0)
    decoder = {"vocab_size": VOCAB, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "embed_dim": 24}
    tower = {"embed_dim": 20, "num_layers": 3, "num_heads": 5, "hidden_dim": 43}
    return llama_clip(
        **decoder,
        max_seq_len=61,
        intermediate_dim=41,
        tie_word_embeddings=False,
        image_size=12,
        patch_size=4,
        **{f"vision_{name}": number for name, number in tower.items()},
        every=2,
        encoder_trainable=True,
        on_missing="participate",
    )


def files_of(save):
    def saved(model, folder):
        save(model, folder)
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}

    return saved


RESULTS = {
    "describe": lambda model, _: str(describe(model)),
    "param_groups": lambda model, _: [
        (g["name"], len(g["params"])) for g in param_groups(model, lr=1.0)
    ],
    "quantize": lambda model, _: quantize(model.requires_grad_(False), "int8_weight_only"),
    "save_fusion": files_of(save_fusion),
    "save_pretrained": files_of(save_pretrained),
    "save_trained": files_of(save_trained),
}


@every_face
@pytest.mark.parametrize("name", RESULTS)
def test_results_equal_those_of_the_fused_model(name, face, tmp_path):
    wrapper = face(VLMWrapper.around(known_parts()))
    result = RESULTS[name](wrapper, tmp_path / "wrapper")
    assert result and result == RESULTS[name](known_parts(), tmp_path / "fused")


def optimizer_of(model):
    return torch.optim.AdamW(param_groups(model, lr=1e-2))


FILES = {
    "fusion": (save_fusion, load_fusion),
    "pretrained": (save_pretrained, load_pretrained),
    "trained": (save_trained, load_trained),
    "checkpoint": (
        lambda model, path: save_checkpoint(path, model, optimizer_of(model), step=3),
        lambda model, path: load_checkpoint(path / "step_3", model, optimizer_of(model)),
    ),
}


@every_face
@pytest.mark.parametrize("name", FILES)
def test_files_of_the_fused_model_are_loaded(name, face, tmp_path):
    source, inner = moved(known_parts()), known_parts()
    save, load = FILES[name]
    save(source, tmp_path / name)
    assert not same_state(state(source), inner)
    load(face(VLMWrapper.around(inner)), tmp_path / name)
    assert same_state(state(source), inner)


def test_freeze_specs_and_modes():
    model = VLMWrapper.around(known_parts())
    apply_freeze_specs(model, [FreezeSpec("*", True), FreezeSpec("adapter.linear_2", False)])
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains == ["adapter.linear_2.weight", "adapter.linear_2.bias"]
    model.train()
    assert model.training and model.adapter.training
    assert not model.vision_encoder.training
    assert not any(layer.training for layer in model.layers)
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["cross_attention", "placeholder", "mot"])
def test_generates_as_the_fused_model(name):
    model, plain, tokens = make(name), fused(name), ids(name, length=9)
    call = {"encoder_input": {"images": pixels()}, "max_new_tokens": 5, "temperature": 0}
    assert torch.equal(generate(model, tokens, **call), generate(plain, tokens, **call))


@pytest.mark.parametrize("given", [{}, {"frame_mask": REAL}], ids=["images", "clips"])
def test_compiles_to_one_graph(given):
    torch._dynamo.reset()
    model, tokens = make("prefix"), ids("prefix")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out, labels = compiled(pixels(F), tokens, tokens, **given)
    torch.testing.assert_close(out, model(pixels(F), tokens, **given)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, tokens)


def check_sharded(rank, folder):
    # One rank has clips, the other has none.
    clips = torch.randn(2, F, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    calls = [(clips, text(), None, REAL[:2]), (None, text())]
    alone, model = (VLMWrapper.around(moved(known_parts())) for _ in range(2))
    losses = [next_token_loss(alone(*call)[0], text())[0] for call in calls]
    (sum(losses) / 2).backward()
    shard(model)
    assert inner_transformer(model) is unwrap(model).fused.decoder
    loss, _ = next_token_loss(model(*calls[rank])[0], text())
    torch.testing.assert_close(loss, losses[rank], rtol=1e-6, atol=1e-6)
    loss.backward()
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None:
            whole = model.get_parameter(name).grad.full_tensor()
            torch.testing.assert_close(whole, parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
    full = StateDictOptions(full_state_dict=True)
    assert list(get_model_state_dict(model, options=full)) == list(alone.state_dict())
    call = {"max_new_tokens": 2, "temperature": 0}
    assert torch.equal(generate(model, text(), **call), generate(alone, text(), **call))
    save_pretrained(model, folder)
    if rank == 0:
        assert same_state(state(alone), from_pretrained(folder))
    distributed.barrier()


@pytest.mark.distributed
def test_two_ranks_equal_one_process(tmp_path):
    run_on_ranks(check_sharded, str(tmp_path / "saved"))
