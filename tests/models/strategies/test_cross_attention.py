import pytest
import torch
from support import BACKENDS, FEATURES, TinyEncoder, inputs, open_gates, text, tiny_decoder
from torch import nn
from torchtune.models.llama3_2_vision import llama3_2_vision_decoder, llama3_2_vision_encoder
from torchtune.modules import MultiHeadAttention, TransformerCrossAttentionLayer
from torchtune.modules.common_utils import disable_kv_cache
from torchtune.modules.model_fusion import DeepFusionModel as TorchtuneDeepFusionModel
from torchtune.training import compile_model

from torchfuse import (
    DeepFusionModel,
    EarlyFusionModel,
    FusionLayer,
    fuse,
    fusion_state_dict,
    generate,
    set_trainable,
)


def make(encoder=None, **options):
    return open_gates(fuse(tiny_decoder(), encoder or TinyEncoder(), every=2, **options))


def two_encoders():
    return make({"eye": TinyEncoder(), "ear": TinyEncoder(in_dim=3, seed=6)})


def sound(num=4):
    return inputs(num=num, in_dim=3, seed=8)


def test_encode_once_use_many_times():
    model = make()
    embeds = model.encode(inputs())
    assert embeds.shape == (2, FEATURES, 18)
    expected = model(text(), encoder_input=inputs())
    assert torch.equal(model(text(), encoder_embeds=embeds), expected)
    named = two_encoders()
    given = {"eye": inputs(), "ear": sound()}
    embeds = named.encode(given)
    assert {name: tuple(e.shape) for name, e in embeds.items()} == {"eye": (2, 7, 18), "ear": (2, 4, 18)}
    assert torch.equal(named(text(), encoder_embeds=embeds), named(text(), encoder_input=given))


def test_a_batch_equals_its_rows_one_by_one():
    model = make().eval()
    x, tokens = inputs(3), text(3)
    mask = torch.zeros(3, 13, FEATURES, dtype=torch.bool)
    mask[0, 4:] = True
    mask[1, :, :3] = True
    together = model(tokens, encoder_input=x, encoder_mask=mask)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model(tokens[one], encoder_input={"x": x["x"][one]}, encoder_mask=mask[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(together[2], model(tokens)[2])


def test_text_before_its_image_does_not_attend_to_it():
    model = make()
    mask = torch.zeros(2, 13, FEATURES, dtype=torch.bool)
    mask[:, 5:] = True
    one = model(text(), encoder_input=inputs(), encoder_mask=mask)
    other = model(text(), encoder_input=inputs(seed=9), encoder_mask=mask)
    assert torch.equal(one[:, :5], other[:, :5])
    assert torch.equal(one[:, :5], tiny_decoder()(text())[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_a_row_mask_is_the_same_for_all_positions():
    model = make()
    rows = torch.rand(2, FEATURES) < 0.5
    every = rows[:, None].expand(-1, 13, -1)
    assert torch.equal(
        model(text(), encoder_input=inputs(), encoder_mask=rows),
        model(text(), encoder_input=inputs(), encoder_mask=every),
    )


def test_several_encoders_are_one_sequence_of_features():
    model = two_encoders()
    given = {"ear": sound(), "eye": inputs()}  # the order is the model's, not the caller's
    both = model(text(), encoder_input=given)
    eye, ear = torch.rand(2, 13, FEATURES) < 0.5, torch.rand(2, 13, 4) < 0.5
    by_name = model(text(), encoder_input=given, encoder_mask={"ear": ear, "eye": eye})
    joined = model(text(), encoder_input=given, encoder_mask=torch.cat([eye, ear], dim=-1))
    assert torch.equal(by_name, joined)
    assert not torch.allclose(by_name, both)
    only = model(text(), encoder_input={"eye": inputs()})
    blind = {"ear": torch.zeros(2, 4, dtype=torch.bool)}
    torch.testing.assert_close(
        model(text(), encoder_input=given, encoder_mask=blind), only, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(model(text(), encoder_input={}), model(text()))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"encoder_input": {"nose": inputs()}}, "No encoder named nose; there are eye, ear"),
        ({"encoder_input": torch.zeros(2, 3)}, "by name, got a Tensor"),
        ({"encoder_input": {"eye": torch.zeros(2)}}, "The input of 'eye' must be a mapping"),
        ({"encoder_input": {"eye": inputs(3)}}, "'eye' have 3 rows, the tokens 2"),
        ({"encoder_input": {"eye": inputs()}, "encoder_embeds": {"eye": 1}}, "not both"),
        ({"encoder_embeds": {"eye": torch.zeros(2, 3, 5)}}, r"must have shape \[b, n, 18\]"),
        (
            {"encoder_input": {"eye": inputs()}, "encoder_mask": torch.ones(2, 13, 9, dtype=torch.bool)},
            "covers 9 features, but there are 7 of 'eye'",
        ),
        (
            {"encoder_input": {"eye": inputs()}, "encoder_mask": {"eye": torch.ones(2, 13, 7)}},
            r"'eye' must be bool .* got torch\.float32",
        ),
        (
            {"encoder_input": {"eye": inputs()}, "encoder_mask": torch.ones(1, 13, 7, dtype=torch.bool)},
            r"with shape \[2, 13, 7\] or \[2, 7\], got torch\.bool \[1, 13, 7\]",
        ),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        two_encoders()(text(), **call)


def test_names_where_there_are_none():
    model = make()
    with pytest.raises(ValueError, match="takes one encoder_mask, got a mapping"):
        model(
            text(), encoder_input=inputs(), encoder_mask={"encoder": torch.ones(2, 7, dtype=torch.bool)}
        )
    with pytest.raises(ValueError, match="one adapter, got several by name"):
        DeepFusionModel(tiny_decoder(), TinyEncoder(), adapter={"a": nn.Identity()})
    with pytest.raises(ValueError, match="names of the encoders, a; got b"):
        DeepFusionModel(tiny_decoder(), {"a": TinyEncoder()}, adapter={"b": nn.Identity()})


def test_an_encoder_that_returns_no_tensor_is_named():
    class Pair(TinyEncoder):
        def forward(self, x):
            return super().forward(x), None

    with pytest.raises(ValueError, match=r"\(Pair\) must return features \[b, n, d_e\], got a tuple"):
        make(Pair())(text(), encoder_input=inputs())


class Recording(TinyEncoder):
    def forward(self, x):
        self.recorded = (torch.is_grad_enabled(), x.dtype)
        return super().forward(x)


def test_a_frozen_encoder_runs_without_grad_and_a_training_one_with():
    model = make(Recording())
    model(text(), encoder_input=inputs())
    assert model.encoder.recorded[0] is False
    model = make(Recording(), encoder_trainable=True)
    model(text(), encoder_input=inputs()).sum().backward()
    assert model.encoder.recorded[0] is True
    assert model.encoder.layers[0].weight.grad.any()
    # A frozen encoder passes on the gradient of its input.
    model = make(Recording())
    x = inputs()["x"].requires_grad_()
    model(text(), encoder_input={"x": x}).square().sum().backward()
    assert x.grad.any()


def test_features_are_cast_where_they_enter():
    model = make(Recording().double())
    model.adapter.bfloat16()
    out = model(text(), encoder_input={"x": inputs()["x"].half()})
    assert model.encoder.recorded[1] == torch.float64
    assert out.dtype == torch.float32
    assert model.encode(inputs()).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_over_features_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    model = make()
    given = {"encoder_input": inputs(), "encoder_mask": torch.rand(2, 13, FEATURES) < 0.5}
    expected = model(text(), **given)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(text(), **given), expected, rtol=1e-4, atol=1e-5)


def test_fusion_after_the_layer():
    model = fuse(tiny_decoder(), TinyEncoder(), every=3, fusion_first=False)
    open_gates(model)
    x = text()
    hidden = model.tok_embeddings(x)
    for layer in tiny_decoder().layers:
        hidden = layer(hidden)
    hidden = model.layers[2].fusion_layer(hidden, encoder_input=model.encode(inputs()))
    torch.testing.assert_close(
        model.unembed(hidden), model(x, encoder_input=inputs()), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_given_to_the_model_itself_is_what_trains_and_what_is_saved():
    decoder = fuse(tiny_decoder(), TinyEncoder(), every=2).decoder
    model = DeepFusionModel(decoder, TinyEncoder(), adapter=nn.Linear(11, 18))
    assert {"adapter.weight", "adapter.bias"} <= fusion_state_dict(model).keys()
    assert model.adapter.weight.requires_grad
    early = EarlyFusionModel(tiny_decoder(), TinyEncoder(), 41, adapter=nn.Linear(11, 18))
    assert [n for n, p in early.named_parameters() if p.requires_grad] == [
        "adapter.weight",
        "adapter.bias",
    ]


def test_a_frozen_adapter_stays_in_evaluation_mode():
    adapter = nn.Sequential(nn.Linear(11, 18), nn.Dropout(0.5))
    model = make(adapter=adapter, fusion_trainable=False).train()
    assert torch.equal(model.encode(inputs()), model.encode(inputs()))
    set_trainable(model)
    assert model.train().adapter.training


def test_dropout_is_in_training_only():
    model, call = make(attn_dropout=0.5), {"encoder_input": inputs()}
    expected = make()(text(), **call)
    assert torch.equal(model.eval()(text(), **call), expected)
    assert not torch.allclose(model.train()(text(), **call), expected)


def test_options_reach_every_layer():
    options = {"norm_eps": 1e-3, "qk_norm": False, "attn_dropout": 0.25, "fusion_first": False}
    model = make(**options)
    described = model.strategy.describe(model.decoder)
    assert {name: described[name] for name in options} == options


def test_caches_that_are_set_up_but_disabled_change_nothing():
    model = make().eval()
    expected = model(text(), encoder_input=inputs())
    model.setup_caches(2, torch.float32)
    with disable_kv_cache(model):
        got = model(text(), encoder_input=inputs())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_torchtune", [False, True])
@pytest.mark.parametrize("width", ["none", "features", "slots"])
def test_a_cache_wider_than_the_features_changes_nothing(of_torchtune, width):
    """Cached steps equal the full forward, for both kinds of layers and masks of both widths."""
    model = make().eval()
    if of_torchtune:
        for layer in model.layers:
            if isinstance(layer, FusionLayer):
                layer.fusion_layer = torchtunes(layer.fusion_layer)
    tokens, s = text(2, 13), 13
    mask = torch.rand(2, s, FEATURES, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[:, 3] = False
    mask[:, 9:] = mask[:, 9:10]  # new tokens attend to what the one before attends to
    mask = None if width == "none" else mask
    expected = model(tokens, encoder_input=inputs(), encoder_mask=mask)
    slots = FEATURES + 5
    model.setup_caches(2, torch.float32, encoder_max_seq_len=slots, decoder_max_seq_len=s)
    # Empty slots are masked out whatever the mask holds; torchtune's layers use the mask as it is.
    wide = nn.functional.pad(mask, (0, 5), value=not of_torchtune) if width == "slots" else mask
    causal = torch.ones(s, s, dtype=torch.bool).tril().expand(2, s, s)
    pos = torch.arange(s).expand(2, s)
    at = slice(0, 10)
    given = {"encoder_input": inputs(), "encoder_mask": None if wide is None else wide[:, at]}
    got = [model(tokens[:, at], mask=causal[:, at], input_pos=pos[:, at], **given)]
    for t in range(10, s):
        at = slice(t, t + 1)
        step = {} if t < 12 else {"encoder_mask": None if wide is None else wide[:, at]}
        got.append(model(tokens[:, at], mask=causal[:, at], input_pos=pos[:, at], **step))
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-5)


def torchtunes(layer):
    """Build torchtune's cross-attention layer with the same weights."""
    attn = layer.attn
    built = TransformerCrossAttentionLayer(
        MultiHeadAttention(
            embed_dim=18,
            num_heads=attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            head_dim=attn.head_dim,
            q_proj=attn.q_proj,
            k_proj=attn.k_proj,
            v_proj=attn.v_proj,
            output_proj=attn.output_proj,
            q_norm=attn.q_norm,
            k_norm=attn.k_norm,
            pos_embeddings=None,
            is_causal=False,
        ),
        layer.mlp,
        ca_norm=layer.ca_norm,
        mlp_norm=layer.mlp_norm,
        ca_scale=layer.ca_scale,
        mlp_scale=layer.mlp_scale,
    )
    assert built.state_dict().keys() == layer.state_dict().keys()
    return built


def test_a_decoder_of_torchtunes_with_torchtunes_fusion_embedding():
    """A drop-in: torchtune's own Llama 3.2 Vision parts, in its model and in DeepFusionModel."""
    sizes = {"num_heads": 4, "num_layers": 2, "embed_dim": 32, "num_kv_heads": 2, "max_seq_len": 40}
    torch.manual_seed(0)
    decoder = llama3_2_vision_decoder(
        vocab_size=37, fusion_interval=2, num_special_tokens=3, encoder_max_seq_len=20, **sizes
    )
    encoder = llama3_2_vision_encoder(
        patch_size=4,
        num_heads=2,
        clip_embed_dim=16,
        clip_num_layers=2,
        clip_hidden_states=[1],
        num_layers_projection=1,
        decoder_embed_dim=32,
        tile_size=8,
        max_num_tiles=2,
    )
    with torch.no_grad():
        for name, parameter in (*decoder.named_parameters(), *encoder.named_parameters()):
            if "scale" in name or "gate" in name:
                parameter.add_(0.3)
    images = {
        "images": torch.randn(2, 1, 2, 3, 8, 8),
        "aspect_ratio": torch.tensor([[[1, 2]], [[2, 1]]]),
    }
    mask = torch.rand(2, 9, 10) < 0.6
    tokens = text(2, 9)
    expected = TorchtuneDeepFusionModel(decoder, encoder)(
        tokens, encoder_input=images, encoder_mask=mask
    )
    model = DeepFusionModel(decoder, encoder)
    got = model(tokens, encoder_input=images, encoder_mask=mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    cached = generate(
        model, tokens, encoder_input=images, encoder_mask=mask, max_new_tokens=5, temperature=0
    )
    grown, visible = tokens, mask
    for _ in range(5):
        with torch.no_grad():
            last = model(grown, encoder_input=images, encoder_mask=visible)[:, -1]
        grown = torch.cat([grown, last.argmax(-1, keepdim=True)], dim=1)
        visible = torch.cat([visible, visible[:, -1:]], dim=1)
    assert torch.equal(cached, grown)


def test_torchtunes_helpers_act_on_fusion_layers():
    model = make()
    model.decoder.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=20)
    assert all(layer.caches_are_setup() for layer in model.layers)
    assert model.layers[1].fusion_layer.attn.kv_cache.max_seq_len == 7
    model = make()
    compile_model(model, verbose=False)
    assert model.layers[1].fusion_layer._compiled_call_impl is not None


def test_options_out_of_range_are_one_error():
    with pytest.raises(
        ValueError, match=r"hidden_dim=-1 must be at least 1; attn_dropout=5 must lie in"
    ):
        make(hidden_dim=-1, attn_dropout=5)


def test_cached_decoding_compiles_to_one_graph():
    model = open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2)).eval()
    tokens = text(2, 8)
    causal = torch.ones(1, 8, 8, dtype=torch.bool).tril().expand(2, -1, -1)

    def run(call):
        model.setup_caches(2, torch.float32, encoder_max_seq_len=FEATURES, decoder_max_seq_len=8)
        model.reset_caches()
        model(tokens[:, :4], encoder_input=inputs(), mask=causal[:, :4], input_pos=torch.arange(4))
        return [
            call(tokens[:, at : at + 1], mask=causal[:, at : at + 1], input_pos=torch.tensor([at]))
            for at in range(4, 8)
        ]

    with torch.no_grad():
        eager = run(model)
        compiled = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_zero_gates_and_rows_that_are_masked_out_leave_the_decoder_as_it_is():
    model = fuse(tiny_decoder(), TinyEncoder(), every=1)
    base = tiny_decoder()(text())
    assert torch.equal(model(text(), encoder_input=inputs()), base)
    open_gates(model)
    mask = torch.zeros(2, 13, FEATURES, dtype=torch.bool)
    mask[1] = True
    out = model(text(), encoder_input=inputs(), encoder_mask=mask)
    assert torch.equal(out[0], base[0])
    assert not torch.allclose(out[1], base[1])
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
