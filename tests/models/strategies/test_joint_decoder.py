import pytest
import torch
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, text, text_with_image, tiny_decoder
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchfuse import EarlyFusionModel, fuse
from torchfuse.models.strategies.prefix import Prefix


def placeholder(**options):
    return fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE, **options)


def prefix(**options):
    return fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", placement="prefix", **options)


class Given(nn.Module):
    """In place of an embedding: returns embeddings as they are."""

    def forward(self, embeds):
        return embeds


def score(embeds, **call):
    """Logits of the plain decoder for these embeddings."""
    decoder = tiny_decoder()
    decoder.tok_embeddings = Given()
    return decoder(embeds, **call)


# --- placeholder ---------------------------------------------------------------------------------


def test_features_are_in_place_of_the_tokens():
    model, tokens = placeholder(), text_with_image()
    embeds = tiny_decoder().tok_embeddings(tokens.clamp(max=VOCAB - 1))
    embeds[:, 2 : 2 + FEATURES] = model.encode(inputs())
    torch.testing.assert_close(
        model(tokens, encoder_input=inputs()), score(embeds), rtol=1e-5, atol=1e-5
    )


def test_two_images_apart_and_rows_with_fewer():
    """Row 0 has two inputs of three features, row 1 has one, row 2 none, and row 3 only its second."""
    model = placeholder()
    tokens = text(4, 11)
    tokens[0, 1:4] = tokens[0, 6:9] = tokens[1, 4:7] = tokens[3, 2:5] = IMAGE
    x = inputs(4, 6)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0] * 6, [0, 0, 0, 1, 1, 1]]).bool()
    features = model.encode(x)
    embeds = tiny_decoder().tok_embeddings(tokens.clamp(max=VOCAB - 1))
    embeds[0, 1:4], embeds[0, 6:9] = features[0, :3], features[0, 3:]
    embeds[1, 4:7], embeds[3, 2:5] = features[1, :3], features[3, 3:]
    out = model(tokens, encoder_input=x, encoder_mask=valid)
    torch.testing.assert_close(out, score(embeds), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[2], model(tokens[2:3])[0], rtol=1e-5, atol=1e-5)
    by_position = valid[:, None].expand(-1, 11, -1)
    assert torch.equal(model(tokens, encoder_input=x, encoder_mask=by_position), out)


def test_several_encoders_each_have_their_token():
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(in_dim=3, seed=6)}
    model = EarlyFusionModel(
        tiny_decoder(),
        {name: nn.Sequential(e, nn.Linear(11, 18)) for name, e in encoders.items()},
        {"eye": IMAGE, "ear": 5},
    )
    tokens = text()
    tokens[tokens == 5] = 6
    tokens[:, 1:4], tokens[:, 8:10] = IMAGE, 5
    eye, ear = {"input": inputs(num=3)["x"]}, {"input": inputs(num=2, in_dim=3)["x"]}
    embeds = tiny_decoder().tok_embeddings(tokens.clamp(max=VOCAB - 1))
    embeds[:, 1:4], embeds[:, 8:10] = model.encoders["eye"](**eye), model.encoders["ear"](**ear)
    out = model(tokens, encoder_input={"ear": ear, "eye": eye})
    torch.testing.assert_close(out, score(embeds), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"Encoder 'ear': every token 5 .* row 0 has 2 tokens and 0 features"
    ):
        model(tokens, encoder_input={"eye": eye})


def test_a_count_is_checked_before_anything_runs():
    model, tokens = placeholder(), text_with_image()
    ran = []
    model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    valid = torch.ones(2, FEATURES, dtype=torch.bool)
    valid[1, 0] = False
    with pytest.raises(ValueError, match=r"row 1 has 7 tokens and 6 features\. Were rows truncated"):
        model(tokens, encoder_input=inputs(), encoder_mask=valid)
    many = text(11, 5)
    many[:, 0] = IMAGE
    with pytest.raises(ValueError, match="row 7 has 1 tokens and 0 features; so do 3 more rows"):
        model(many)
    assert ran == []


def test_a_wrong_count_is_an_assertion_in_a_graph():
    torch._dynamo.reset()
    model = torch.compile(placeholder(), backend="aot_eager", fullgraph=True)
    tokens = text_with_image()
    good = model(tokens, encoder_input=inputs())
    torch.testing.assert_close(good, placeholder()(tokens, encoder_input=inputs()), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        RuntimeError, match="tokens 41 and features of encoder 'encoder' differ in number"
    ):
        model(text(), encoder_input=inputs())


def test_gradients_of_features_and_of_text():
    model = placeholder(encoder_trainable=True, decoder_trainable=True)
    model(text_with_image(), encoder_input=inputs()).square().mean().backward()
    assert all(p.grad.any() for p in model.adapter.parameters())
    assert model.encoder.layers[0].weight.grad.any()
    # The row that is looked up for placeholders has no gradient from them.
    assert not model.tok_embeddings.weight.grad[0].any()


# --- prefix --------------------------------------------------------------------------------------


def test_features_are_in_front_and_are_cut_off_before_the_head():
    model, tokens = prefix(), text()
    widths = []
    model.norm.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    out = model(tokens, encoder_input=inputs())
    assert widths == [13]  # no position of the prefix reaches the head
    embeds = torch.cat([model.encode(inputs()), tiny_decoder().tok_embeddings(tokens)], dim=1)
    torch.testing.assert_close(out, score(embeds)[:, FEATURES:], rtol=1e-5, atol=1e-5)


def test_rows_with_fewer_features_equal_them_alone():
    model, tokens, x = prefix(), text(3), inputs(3)
    valid = torch.zeros(3, FEATURES, dtype=torch.bool)
    valid[0], valid[1, :4] = True, True
    out = model(tokens, encoder_input=x, encoder_mask=valid)
    torch.testing.assert_close(
        out[0], model(tokens[:1], encoder_input={"x": x["x"][:1]})[0], rtol=1e-4, atol=1e-5
    )
    fewer = {"x": x["x"][1:2, :4]}
    torch.testing.assert_close(out[1], model(tokens[1:2], encoder_input=fewer)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[2], tiny_decoder()(tokens[2:])[0], rtol=1e-4, atol=1e-5)
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.adapter.parameters())


def test_text_that_may_not_attend_to_the_prefix():
    model, tokens = prefix(), text()
    mask = torch.zeros(2, 13, FEATURES, dtype=torch.bool)
    mask[:, 6:] = True
    one = model(tokens, encoder_input=inputs(), encoder_mask=mask)
    other = model(tokens, encoder_input=inputs(seed=9), encoder_mask=mask)
    torch.testing.assert_close(one[:, :6], other[:, :6], rtol=0, atol=0)
    assert not torch.allclose(one[:, 6:], other[:, 6:])


def test_a_mask_and_positions_of_the_text_are_the_texts():
    """Two documents packed into a row, each with its own positions, after one prefix."""
    model, tokens = prefix(), text()
    documents = torch.tensor([0] * 6 + [1] * 7).expand(2, -1)
    mask = torch.ones(13, 13, dtype=torch.bool).tril() & (documents[:, :, None] == documents[:, None])
    at = torch.cat([torch.arange(6), torch.arange(7)]).expand(2, -1)
    out = model(tokens, encoder_input=inputs(), mask=mask, input_pos=at)
    for document, where in ((0, slice(0, 6)), (1, slice(6, 13))):
        alone = model(tokens[:, where], encoder_input=inputs())
        torch.testing.assert_close(out[:, where], alone, rtol=1e-4, atol=1e-5)
        assert document in (0, 1)


def test_prefix_mask_by_hand():
    mask = torch.tensor([[[True, False], [True, False], [True, False]]])
    got = Prefix.from_mask(mask).full_mask(None, slots=None)[0].int().tolist()
    assert got == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],  # invalid, attends to itself
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 1],
    ]
    assert Prefix.from_mask(mask).full_positions(None).tolist() == [[0, 0, 1, 2, 3]]
    assert Prefix.from_mask(mask).full_mask(None, slots=6).shape == (1, 5, 6)


@pytest.mark.parametrize("make", [placeholder, prefix])
def test_a_sequence_that_is_too_long_is_named(make):
    model = make()
    tokens = text_with_image(length=50) if make is placeholder else text(length=50)
    if make is prefix:
        with pytest.raises(
            ValueError, match="of text and features is 57 tokens long.*max_seq_len is 53"
        ):
            model(tokens, encoder_input=inputs())
    else:
        assert model(tokens, encoder_input=inputs()).shape == (2, 50, VOCAB)


def test_rows_of_features_and_of_text_must_agree():
    with pytest.raises(ValueError, match="'encoder' have 3 rows, the tokens 2"):
        prefix()(text(), encoder_input=inputs(3))


@pytest.mark.parametrize("make", [placeholder, prefix])
def test_a_mask_over_features_compiles_to_one_graph(make):
    torch._dynamo.reset()
    model = make()
    tokens = text_with_image() if make is placeholder else text()
    given = {"encoder_input": inputs(), "encoder_mask": torch.ones(2, FEATURES, dtype=torch.bool)}
    expected = model(tokens, **given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, **given)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        ({"eye": 1, "ear": 1}, "cannot share a token"),
        ({"eye": 1}, "names of the encoders, eye, ear; got eye"),
        (3, "need a token each"),
    ],
)
def test_tokens_of_several_encoders(tokens, complaint):
    with pytest.raises(ValueError, match=complaint):
        EarlyFusionModel(tiny_decoder(), {"eye": TinyEncoder(), "ear": TinyEncoder()}, tokens)


def test_a_mask_over_flat_features_is_refused():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    tokens = text(3, 13)
    tokens[0, :FEATURES] = IMAGE
    model(tokens, encoder_input=inputs(1))
    with pytest.raises(ValueError, match="have 1 rows, the tokens 3.*or no mask"):
        model(tokens, encoder_input=inputs(1), encoder_mask=torch.zeros(3, FEATURES, dtype=torch.bool))


@pytest.mark.parametrize("first", ["image", "text"])
def test_a_prefix_is_the_start_of_the_sequence_or_is_refused(first):
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", placement="prefix").eval()
    model.setup_caches(2, torch.float32, decoder_max_seq_len=40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 40, 40)
    pos = torch.arange(40).expand(2, 40)
    given = {"encoder_input": inputs()} if first == "image" else {}
    model(text(2, 5), mask=mask[:, :5], input_pos=pos[:, :5], **given)
    with pytest.raises(ValueError, match=r"hold a sequence already.*reset_caches"):
        model(text(2, 3), mask=mask[:, 5:8], input_pos=pos[:, 5:8], encoder_input=inputs())
    model.reset_caches()
    model(text(2, 3), mask=mask[:, :3], input_pos=pos[:, :3], encoder_input=inputs())


def test_distributed_checkpoints_have_the_names_of_parameters():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    assert list(get_model_state_dict(model)) == [name for name, _ in model.named_parameters()]
    assert "decoder.tok_embeddings.weight" in model.state_dict()


def test_too_many_and_too_few_features_are_named_by_row():
    model = fuse(
        tiny_decoder(), {"image": TinyEncoder()}, arch="joint_decoder", encoder_token={"image": IMAGE}
    )
    tokens = text_with_image()
    for number, got in ((FEATURES + 1, FEATURES + 1), (FEATURES - 2, FEATURES - 2)):
        with pytest.raises(
            ValueError, match=rf"'image'.*row 0 has 7 tokens and {got} features; row 1 has 7"
        ):
            model(tokens, encoder_input={"image": inputs(num=number)})
    # As many in the batch, but not in the rows.
    tokens[0, 2] = 1
    tokens[1, 1] = IMAGE
    with pytest.raises(ValueError, match="row 0 has 6 tokens and 7 features; row 1 has 8 tokens and 7"):
        model(tokens, encoder_input={"image": inputs()})


def test_placeholders_without_features_are_an_error():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    with pytest.raises(ValueError, match="row 0 has 7 tokens and 0 features"):
        model(text_with_image())


def test_flat_features_are_counted_over_the_batch():
    """As in torchtune: features of any number of images, in the order of the tokens."""
    model = EarlyFusionModel(
        tiny_decoder(),
        {"image": nn.Linear(5, 18)},
        {"image": IMAGE},
        encoders_trainable=True,
        strict=True,
    )
    tokens = text()
    tokens[0, 2:6] = IMAGE
    tokens[1, 4:6] = IMAGE
    x = torch.randn(3, 2, 5)
    flat = model(tokens, encoder_input={"image": {"input": x}})
    rows = torch.zeros(2, 4, 5)
    rows[0], rows[1, :2] = x[:2].flatten(0, 1), x[2]
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    by_row = model(tokens, encoder_input={"image": {"input": rows}}, encoder_mask=valid)
    torch.testing.assert_close(flat, by_row, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the batch has 6 tokens and 8 features"):
        model(tokens, encoder_input={"image": {"input": torch.randn(4, 2, 5)}})
