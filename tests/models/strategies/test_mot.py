import pytest
import torch
from models.architectures import (
    LAYOUTS,
    TWO,
    equals_its_rows,
    move,
    prompt,
    refused,
    rows_of_images,
    two_encoders,
)
from support import (
    FEATURES,
    IMAGE,
    VOCAB,
    TinyEncoder,
    inputs,
    text,
    tiny_decoder,
)
from torch import nn
from torchtune.models.gemma2 import gemma2
from torchtune.modules.common_utils import disable_kv_cache

from torchfuse import (
    MixtureFusionModel,
    fuse,
    get_fusion_params,
    quantize,
)
from torchfuse.models.strategies.placeholder import positions_by_modality
from torchfuse.modules.experts.mixture_of_transformers import MoTLayer, MoTNorm
from torchfuse.training.loss import next_token_loss


def fresh(layout, *, decoder=None, encoder=None, **options):
    options = {"encoder_trainable": True, **LAYOUTS[layout], **options}
    return fuse(decoder or tiny_decoder(), encoder or TinyEncoder(), arch="mot", **options)


def make(layout, **options):
    return move(fresh(layout, **options))


class Given(nn.Module):
    """In place of an embedding: returns embeddings as they are."""

    def forward(self, embeds):
        return embeds


def score(embeds, **call):
    decoder = tiny_decoder()
    decoder.tok_embeddings = Given()
    return decoder(embeds, **call)


def embedded(tokens):
    return tiny_decoder().tok_embeddings(tokens.clamp(max=VOCAB - 1))


# --- what is scored ------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"tied": True}, {}], ids=["tied", "untied"])
@pytest.mark.parametrize("start", ["warm", "zero"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_is_scored_as_before_to_the_bit(layout, start, changes):
    expected = tiny_decoder(**changes)(text())
    model = fresh(layout, decoder=tiny_decoder(**changes), start=start, fusion_vocab_size=2)
    assert isinstance(model, MixtureFusionModel)
    assert torch.equal(model(text()), expected)
    assert torch.equal(move(model)(text()), expected)


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"layers": [0]}], ids=str)
def test_warm_prefix_is_the_decoder_over_features_and_text(options):
    """Copies of the text's weights compute the same; only positions are each modality's own."""
    model = fresh("prefix", encoder=two_encoders(), **options)
    given = {"eye": inputs(), "ear": inputs(num=3)}
    features = model.encode(given)
    embeds = torch.cat([features["eye"], features["ear"], embedded(text())], dim=1)
    at = torch.cat([torch.arange(n) for n in (FEATURES, 3, 13)]).expand(2, -1)
    out = model(text(), encoder_input=given)
    torch.testing.assert_close(out, score(embeds, input_pos=at)[:, -13:], rtol=1e-5, atol=1e-5)


def test_warm_placeholders_are_the_decoder_over_features_and_text():
    model = fresh("placeholder", encoder=two_encoders(), encoder_token=TWO)
    tokens, given, masks = rows_of_images()
    embeds, features = embedded(tokens), model.encode(given)
    at = torch.zeros_like(tokens)
    for row in range(4):
        counts = dict.fromkeys(("text", *TWO), 0)
        for column, token in enumerate(tokens[row].tolist()):
            modality = next((name for name, special in TWO.items() if special == token), "text")
            if modality != "text":
                embeds[row, column] = features[modality][row][masks[modality][row]][counts[modality]]
            at[row, column] = counts[modality]
            counts[modality] += 1
    out = model(tokens, encoder_input=given, encoder_mask=masks)
    torch.testing.assert_close(out, score(embeds, input_pos=at), rtol=1e-5, atol=1e-5)


def test_a_batch_equals_its_rows_one_by_one():
    model = make("placeholder", encoder=two_encoders(), encoder_token=TWO)
    tokens, given, masks = rows_of_images()
    together = model(tokens, encoder_input=given, encoder_mask=masks)
    equals_its_rows(together, model)
    front, valid = make("prefix"), torch.zeros(3, FEATURES, dtype=torch.bool)
    valid[0], valid[1, :4] = True, True
    together = front(text(3), encoder_input=inputs(3), encoder_mask=valid)
    for row, num in enumerate((7, 4, 0)):
        own = {"encoder_input": {"x": inputs(3)["x"][row : row + 1, :num]}} if num else {}
        alone = front(text(3)[row : row + 1], **own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_positions_by_hand():
    image = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 0]]).bool()
    sound = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 0]]).bool()
    places = {"image": image, "sound": sound}
    at, counts = positions_by_modality(places, torch.arange(9)[None], None)
    assert at.tolist() == [[0, 0, 1, 0, 1, 2, 2, 3, 3]]
    assert {name: int(count) for name, count in counts.items()} == {"image": 4, "sound": 1}
    later, counts = positions_by_modality(places, torch.arange(9, 18)[None], counts)
    assert later.tolist() == [[4, 4, 5, 1, 5, 6, 6, 7, 7]]
    assert int(counts["image"]) == 8
    two_documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    at, _ = positions_by_modality(places, two_documents, None)
    assert at.tolist() == [[0, 0, 1, 0, 0, 0, 1, 1, 2]]


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_and_positions_of_the_text_are_the_texts(layout):
    """Two documents packed into a row, with their own positions."""
    model, tokens = make(layout), prompt(layout, start=6)
    documents = torch.tensor([0] * 6 + [1] * 7 + [2] * 0).expand(2, -1)
    if layout == "placeholder":
        tokens = torch.cat([tokens, text(2, 3, seed=8)], dim=1)
        documents = torch.tensor([0] * 6 + [1] * 10).expand(2, -1)
    same = documents[:, :, None] == documents[:, None]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril() & same
    at = torch.cat([torch.arange(6), torch.arange(tokens.shape[1] - 6)]).expand(2, -1)
    out = model(tokens, encoder_input=inputs(), mask=mask, input_pos=at)
    first = {"encoder_input": inputs()} if layout == "prefix" else {}
    pieces = [model(tokens[:, :6], **first), model(tokens[:, 6:], encoder_input=inputs())]
    torch.testing.assert_close(out, torch.cat(pieces, dim=1), rtol=1e-4, atol=1e-5)


def test_with_labels_on_answers_alone_the_last_layer_learns_keys_and_values_only():
    tokens = prompt("placeholder")
    labels = tokens.masked_fill(tokens == IMAGE, -100)
    answers = labels.clone()
    answers[:, :11] = -100

    def unmoved(model, labels):
        model.zero_grad()
        next_token_loss(model(tokens, encoder_input=inputs()), labels)[0].backward()
        return {name for name, p in get_fusion_params(model).items() if not p.grad.any()}

    whole, norm = fresh("placeholder"), "decoder.norm.fusion_layer.encoder.scale"
    parts = ("attn.q_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    last = "decoder.layers.2.fusion_layer.encoder"
    unread = {f"{last}.{part}.weight" for part in parts} | {f"{last}.mlp_norm.scale", norm}
    assert unmoved(whole, answers) == unread
    assert not unmoved(whole, labels)
    one = answers.clone()
    one[:, 9] = labels[:, 9]  # after the last feature
    assert not unmoved(whole, one)
    # Without the last layer, only the norm is left.
    assert unmoved(fresh("placeholder", layers=[0, 1]), answers) == {norm}


# Dynamo looks for gradients of the hidden states that a layer is called with.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_graph_for_each_layer_equals_eager_in_values_and_gradients():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = make("prefix")
        for layer in model.layers if compiled else ():
            layer.compile(backend="aot_eager", fullgraph=True)
        loss, _ = next_token_loss(model(text(), encoder_input=inputs()), text().roll(1, 1))
        loss.backward()
        results.append({"loss": loss} | {n: p.grad for n, p in get_fusion_params(model).items()})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


# --- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"every": 2}, {"num_output_chunks": 3}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cached_steps_equal_the_full_forward(layout, options):
    options = dict(options)
    chunks = options.pop("num_output_chunks", 0)
    model, tokens = make(layout, **options).eval(), prompt(layout, length=17)
    expected = model(tokens, encoder_input=inputs()).detach()
    model.set_num_output_chunks(chunks)
    chunked = model(tokens, encoder_input=inputs())
    assert torch.equal(torch.cat(list(chunked), dim=1 if chunks else 0).view_as(expected), expected)
    model.set_num_output_chunks(0)
    extra = model.strategy.extra_tokens(FEATURES)
    model.setup_caches(2, torch.float32, decoder_max_seq_len=17 + extra)
    mask = torch.ones(17 + extra, 17 + extra, dtype=torch.bool).tril()[:17].expand(2, -1, -1)
    for start, end in ((0, 11), (11, 12), (12, 15), (15, 16), (16, 17)):
        given = {"encoder_input": inputs()} if start == 0 else {}
        at = torch.arange(start, end)
        out = model(tokens[:, start:end], mask=mask[:, start:end], input_pos=at, **given)
        torch.testing.assert_close(out, expected[:, start:end], rtol=1e-5, atol=1e-5)
    model.reset_caches()
    out = model(tokens[:, :2], mask=mask[:, :2], input_pos=torch.arange(2))
    torch.testing.assert_close(out, tiny_decoder()(tokens[:, :2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_that_are_set_up_but_disabled_change_nothing(layout):
    model, call = make(layout).eval(), {"encoder_input": inputs()}
    expected = model(prompt(layout), **call)
    model.setup_caches(2, torch.float32)
    with disable_kv_cache(model):
        got = model(prompt(layout), **call)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# --- building ------------------------------------------------------------------------------------


def kinds(model):
    return [
        None if not isinstance(layer, MoTLayer) else layer.keys_and_values_only for layer in model.layers
    ]


def test_which_layers_are_fused_and_where_keys_and_values_are_enough():
    assert kinds(fresh("prefix")) == [False, False, True]
    assert kinds(fresh("placeholder")) == [False, False, False]
    assert kinds(fresh("prefix", every=2)) == [None, False, None]
    assert kinds(fresh("prefix", layers=[2, 0])) == [False, None, True]
    assert not isinstance(fresh("prefix").norm, MoTNorm)
    assert isinstance(fresh("placeholder").norm, MoTNorm)
    model = fresh("placeholder", layers=(0, 2))
    assert model.strategy.describe(model.decoder) == {
        "placement": "placeholder",
        "encoder_token": IMAGE,
        "layers": [0, 2],
    }


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 4}, "every=4 fuses no layer of this decoder, which has 3"),
        ({"every": 0}, "every=0 fuses no layer"),
        ({"layers": []}, "must name layers of this decoder, 0 to 2"),
        ({"layers": [0, 3]}, "0 to 2, each once; got"),
        ({"start": "cold"}, "start must be 'warm' or 'zero', got 'cold'"),
        ({"placement": "placeholder", "encoder_token": {"eye": 3}}, "encoders, encoder; got eye"),
        (
            {"encoder_trainable": {"eye": True}, "placement": "placeholder", "encoder_token": 41},
            "No encoder named eye",
        ),
        ({"heads": 3}, "architecture 'mot': unknown option 'heads'; it takes placement"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    refused("mot", options, complaint)


def test_layers_of_another_make_are_named():
    sizes = {"embed_dim": 12, "intermediate_dim": 13, "max_seq_len": 11, "vocab_size": 7}
    with pytest.raises(ValueError, match="Layer 0 cannot be fused.*Gemma2Attention is not torchtune's"):
        fuse(
            gemma2(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6, **sizes),
            TinyEncoder(),
            arch="mot",
        )
    decoder = tiny_decoder(num_layers=1)
    quantize(decoder.requires_grad_(False), "int8_weight_only")
    with pytest.raises(ValueError, match=r"attn\.q_proj\.weight is quantized \(int8\): fuse first"):
        fuse(decoder, TinyEncoder(), arch="mot")


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_experts_beside_adapted_layers_are_plain(quantized):
    from torchtune.models.llama3_2 import lora_llama3_2

    decoder = lora_llama3_2(
        ["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        vocab_size=VOCAB,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        embed_dim=128,  # the smallest that NF4's blocks fit
        intermediate_dim=256,
        max_seq_len=29,
        lora_rank=3,
        lora_alpha=5,
        quantize_base=quantized,
    )
    expected = decoder(text())
    model = fuse(decoder, TinyEncoder(), arch="mot")
    assert torch.equal(model(text()), expected)
    new = {n: p for n, p in get_fusion_params(model).items() if ".lora_" not in n}
    assert not any("fusion_layer" in n for n in get_fusion_params(model).keys() - new.keys())
    expert, layer = model.layers[0].fusion_layer["encoder"], model.layers[0]
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(expert.attn.q_proj(x), layer.attn.q_proj(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expert.mlp(x), layer.mlp(x), rtol=1e-4, atol=1e-5)
    model(text(), encoder_input=inputs()).square().mean().backward()
    assert all(p.grad.any() for p in new.values())
