import pytest
import torch
from support import FEATURES, TinyEncoder, inputs, open_gates, text, tiny_decoder
from torch import nn

from torchfuse import DeepFusionModel, fuse


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


def test_text_before_its_image_does_not_see_it():
    model = make()
    mask = torch.zeros(2, 13, FEATURES, dtype=torch.bool)
    mask[:, 5:] = True
    one = model(text(), encoder_input=inputs(), encoder_mask=mask)
    other = model(text(), encoder_input=inputs(seed=9), encoder_mask=mask)
    assert torch.equal(one[:, :5], other[:, :5])
    assert torch.equal(one[:, :5], tiny_decoder()(text())[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


def test_a_row_mask_stands_for_all_positions():
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
        self.seen = (torch.is_grad_enabled(), x.dtype)
        return super().forward(x)


def test_a_frozen_encoder_runs_without_grad_and_a_training_one_with():
    model = make(Recording())
    model(text(), encoder_input=inputs())
    assert model.encoder.seen[0] is False
    model = make(Recording(), encoder_trainable=True)
    model(text(), encoder_input=inputs()).sum().backward()
    assert model.encoder.seen[0] is True
    assert model.encoder.layers[0].weight.grad.any()
    # A frozen encoder still lets through what its input asks for.
    model = make(Recording())
    x = inputs()["x"].requires_grad_()
    model(text(), encoder_input={"x": x}).square().sum().backward()
    assert x.grad.any()


def test_features_are_cast_where_they_enter():
    model = make(Recording().double())
    model.adapter.bfloat16()
    out = model(text(), encoder_input={"x": inputs()["x"].half()})
    assert model.encoder.seen[1] == torch.float64
    assert out.dtype == torch.float32
    assert model.encode(inputs()).dtype == torch.float32


def test_activation_checkpointing_gives_the_same_gradients():
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.training import set_activation_checkpointing

    def gradients(model):
        model(text(), encoder_input=inputs()).square().mean().backward()
        return {
            name.replace("_checkpoint_wrapped_module.", ""): p.grad
            for name, p in model.named_parameters()
            if p.grad is not None
        }

    plain, wrapped = make(decoder_trainable=True), make(decoder_trainable=True)
    set_activation_checkpointing(wrapped, {TransformerSelfAttentionLayer})
    assert "checkpoint" in str(type(wrapped.layers[1].wrapped)).lower()
    expected, got = gradients(plain), gradients(wrapped)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("mask", [False, True])
def test_compiles_to_one_graph(mask):
    torch._dynamo.reset()
    model = make()
    given = {"encoder_input": inputs()}
    if mask:
        given["encoder_mask"] = torch.rand(2, 13, FEATURES) < 0.5
    expected = model(text(), **given)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(text(), **given), expected, rtol=1e-4, atol=1e-5
    )


def test_fusion_behind_the_layer():
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
