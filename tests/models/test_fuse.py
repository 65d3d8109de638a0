import pytest
import torch
from support import FEATURE_DIM, IMAGE, WIDTH, TinyEncoder, inputs, text, text_with_image, tiny_decoder
from torch import nn
from torchtune.modules import TiedLinear

from torchfuse import (
    DeepFusionModel,
    EarlyFusionModel,
    FusionEmbedding,
    FusionLayer,
    fuse,
    generate,
    get_fusion_params,
)
from torchfuse.models import DeepStackStrategy, JointDecoderStrategy, MoMaStrategy, MoTStrategy
from torchfuse.modules.adapters import LinearAdapter


@pytest.mark.parametrize(("every", "fused"), [(1, [0, 1, 2]), (2, [1]), (3, [2])])
def test_every(every, fused):
    model = fuse(tiny_decoder(), TinyEncoder(), every=every)
    assert [i for i, layer in enumerate(model.layers) if isinstance(layer, FusionLayer)] == fused


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"every": 1},
        {"every": 2, "fusion_first": False},
        {"arch": "joint_decoder", "encoder_token": IMAGE},
        {"arch": "joint_decoder", "placement": "prefix"},
    ],
    ids=str,
)
def test_text_is_scored_as_before_to_the_bit(options, vocab, tied):
    expected = tiny_decoder(tied=tied)(text())
    model = fuse(tiny_decoder(tied=tied), TinyEncoder(), fusion_vocab_size=vocab, **options)
    assert torch.equal(model(text()), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"every": 2},
        {"arch": "joint_decoder", "encoder_token": IMAGE},
        {"arch": "joint_decoder", "placement": "prefix"},
    ],
    ids=str,
)
@pytest.mark.parametrize("adapter", ["linear", "mlp_2layer", nn.Linear(FEATURE_DIM, WIDTH)], ids=str)
def test_features_reach_the_logits_and_gradients_the_adapter(options, adapter):
    model = fuse(tiny_decoder(), TinyEncoder(), adapter=adapter, **options)
    for name, p in model.named_parameters():
        if name.endswith("_scale.scale"):
            p.detach().fill_(0.7)
    tokens = text_with_image() if "encoder_token" in options else text()
    out = model(tokens, encoder_input=inputs())
    assert out.shape == (2, 13, 37)
    assert not torch.allclose(out, model(tokens, encoder_input=inputs(seed=9)))
    out.square().mean().backward()
    assert all(p.grad.any() for p in model.adapter.parameters())
    assert all(p.grad is None for p in model.encoder.parameters())


def test_parts_become_parts_of_the_model_themselves():
    decoder, encoder = tiny_decoder(), TinyEncoder()
    decoders, encoders = dict(decoder.named_parameters()), dict(encoder.named_parameters())
    values = {name: p.clone() for name, p in decoders.items()}
    model = fuse(decoder, encoder, every=2, fusion_vocab_size=2)
    own = dict(model.named_parameters())
    assert all(own[f"decoder.{name}"] is p for name, p in decoders.items())
    assert all(own[f"encoder.{name}"] is p for name, p in encoders.items())
    assert all(torch.equal(values[name], p) for name, p in decoders.items())
    assert {name.split(".")[0] for name in own} == {"decoder", "encoder", "adapter"}


def test_named_encoders_and_their_keys():
    model = fuse(
        tiny_decoder(),
        {"eye": TinyEncoder(), "ear": TinyEncoder(in_dim=3)},
        every=3,
        adapter={"eye": "linear", "ear": "mlp_2layer"},
    )
    heads = {".".join(name.split(".")[:2]) for name in model.state_dict() if name[0] in "ea"}
    assert heads == {"encoders.eye", "encoders.ear", "adapters.eye", "adapters.ear"}
    assert isinstance(model.adapters["eye"], LinearAdapter)
    given = {"eye": inputs(), "ear": inputs(num=3, in_dim=3)}
    assert model(text(), encoder_input=given).shape == (2, 13, 37)


def test_without_an_adapter_the_encoder_has_the_decoders_width():
    model = fuse(tiny_decoder(), nn.Linear(5, WIDTH), every=3, adapter=None)
    assert model(text(), encoder_input={"input": inputs()["x"]}).shape == (2, 13, 37)
    model = fuse(tiny_decoder(), TinyEncoder(), every=3, adapter=None)
    with pytest.raises(
        ValueError, match=r"must have shape \[b, n, 18\].*got \[2, 7, 11\]. Is an adapter"
    ):
        model(text(), encoder_input=inputs())


def test_new_parts_have_the_decoders_dtype_and_device():
    model = fuse(tiny_decoder().bfloat16(), TinyEncoder(), every=2, fusion_vocab_size=2)
    assert {p.dtype for n, p in model.named_parameters() if not n.startswith("encoder")} == {
        torch.bfloat16
    }
    assert model(text(), encoder_input=inputs()).shape == (2, 13, 37)
    with torch.device("meta"):
        decoder = tiny_decoder()
    model = fuse(decoder, TinyEncoder(), every=2, fusion_vocab_size=2)
    assert {p.device.type for n, p in model.named_parameters() if not n.startswith("encoder")} == {
        "meta"
    }


def test_a_tied_head_is_tied_to_the_embedding_in_place():
    model = fuse(tiny_decoder(tied=True), TinyEncoder(), every=2, fusion_vocab_size=2)
    assert isinstance(model.tok_embeddings, FusionEmbedding)
    assert model.output.tied_module is model.tok_embeddings
    with torch.no_grad():
        model.tok_embeddings.weight = nn.Parameter(torch.zeros(37, WIDTH))
    assert not model(text()).any()


def test_classes_and_options():
    deep = fuse(
        tiny_decoder(), TinyEncoder(), every=3, num_heads=9, num_kv_heads=3, hidden_dim=5, qk_norm=False
    )
    new = deep.layers[2].fusion_layer
    assert isinstance(deep, DeepFusionModel)
    assert (new.attn.num_heads, new.attn.num_kv_heads, new.attn.head_dim) == (9, 3, 2)
    assert new.mlp.w1.out_features == 5
    assert new.attn.q_norm is None
    assert deep.strategy.options()["num_heads"] == 9
    early = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    assert isinstance(early, EarlyFusionModel)
    assert early.encoder_tokens == IMAGE


def structure(decoder):
    return [id(m) for m in decoder.modules()], [p.requires_grad for p in decoder.parameters()]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": 4}, "every=4 fuses no layer of this decoder, which has 3.*between 1 and 3"),
        ({"every": 0}, "every=0 fuses no layer"),
        ({"every": True}, "every=True fuses no layer"),
        ({"every": "2"}, "every='2' fuses no layer"),
        ({"layers": [1]}, r"layers=\[1\] and every=1 both choose the layers to fuse"),
        (
            {"arch": "joint_decoder", "encoder_token": IMAGE},
            "every=1 cannot be given: JointDecoderStrategy fuses no layer",
        ),
        ({"arch": ["mot"]}, r"Unknown architecture \['mot'\] \(a name, or for fuse a strategy with its"),
        ({"arch": JointDecoderStrategy}, "JointDecoderStrategy'> .*; there are cross_attention, "),
        ({"norm_eps": 0}, "norm_eps=0 must be a finite number greater than 0"),
        ({"adapter": 5}, "Unknown adapter 5; there are "),
        (
            {"adapter": LinearAdapter(FEATURE_DIM, 5)},
            r"adapter of \'encoder\' \(LinearAdapter\) does not fit: its out_dim is 5, the width of the decoder 18\.$",
        ),
        (
            {"adapter": LinearAdapter(7, 5)},
            "its in_dim is 7, the width of the encoder's features 11; its out_dim is 5, the width of the d",
        ),
        (
            {"adapter": LinearAdapter(FEATURE_DIM, WIDTH), "encoder_dim": 7},
            "its in_dim is 11, the width of the encoder's features 7",
        ),
        (
            {"arch": "crossattention"},
            "Unknown architecture 'crossattention'; there are cross_attention, .*joint",
        ),
        (
            {"nm_heads": 3},
            "architecture 'cross_attention': unknown option 'nm_heads'; it takes .*num_heads",
        ),
        ({"num_heads": 7}, "num_heads=7 must divide the attention width 18"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_kv_heads must divide num_heads, got 2 and 3"),
        ({"adapter": "conv"}, "Unknown adapter 'conv'; there are .*linear, mlp_2layer"),
        ({"adapter": {"eye": "linear"}}, "adapter must have the names of the encoders"),
        ({"fusion_vocab_size": 2, "fusion_init": "zero"}, "init must be"),
        ({"fusion_vocab_size": -1}, "num_new must be at least 1"),
        ({"fusion_vocab_size": 0, "fusion_head": True}, "there are none: give fusion_vocab_size"),
        ({"fusion_head": True, "encoder_trainable": {"eye": True}}, "No encoder named eye"),
        ({"encoder_trainable": {"eye": True}}, "No encoder named eye; there are encoder"),
        ({"on_missing": "wait"}, 'on_missing must be "skip" or "participate"'),
        ({"arch": "joint_decoder", "placement": "placeholder", "every": None}, "needs encoder_token"),
        (
            {"arch": "joint_decoder", "encoder_token": {"eye": 3}},
            "names of the encoders, encoder; got eye",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_and_nothing_has_changed(options, complaint):
    decoder, encoder = tiny_decoder(tied=True), TinyEncoder()
    before = structure(decoder), structure(encoder)
    output, head = decoder.output, decoder.output.tied_module
    options = {"every": 1, "fusion_vocab_size": 1} | options
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, encoder, **options)
    assert (structure(decoder), structure(encoder)) == before
    assert decoder.output is output
    assert output.tied_module is head
    assert torch.equal(decoder(text()), tiny_decoder(tied=True)(text()))


@pytest.mark.parametrize(
    "encoder", [None, "clip", {"eye": None}, [TinyEncoder()]], ids=["none", "name", "named", "list"]
)
def test_what_is_no_encoder_is_refused(encoder):
    decoder = tiny_decoder()
    before = structure(decoder)
    with pytest.raises(
        ValueError, match=r"encoder must be a module that returns features .* got (None|'c|\[)"
    ):
        fuse(decoder, encoder, every=1)
    assert structure(decoder) == before
    with pytest.raises(ValueError, match="fuse needs a decoder .* got a NoneType"):
        fuse(None, TinyEncoder())


def test_an_adapter_of_named_encoders_that_does_not_fit_is_named():
    adapters = {"eye": "linear", "ear": LinearAdapter(FEATURE_DIM, WIDTH)}
    with pytest.raises(
        ValueError, match="adapter of 'ear' .* its in_dim is 11, the width .* features 3"
    ):
        fuse(
            tiny_decoder(),
            {"eye": TinyEncoder(), "ear": Narrow()},
            every=1,
            adapter=adapters,
        )


class Narrow(nn.Linear):
    feature_dim = 3

    def __init__(self):
        super().__init__(5, 3)


NO_FEATURES = {
    "cross_attention": {"every": 1},
    "joint_decoder": {"placement": "prefix"},
    "mot": {},
    "moma": {"num_experts": 2},
    "deepstack": {},
}


@pytest.mark.parametrize("shape", [(2, 0), (0, 7)], ids=str)
@pytest.mark.parametrize("placement", ["prefix", "placeholder"])
@pytest.mark.parametrize("arch", NO_FEATURES)
def test_no_features_are_a_batch_of_text(arch, placement, shape):
    options = dict(NO_FEATURES[arch])
    if arch != "cross_attention":
        options["placement"] = placement
    if options.get("placement") == "placeholder":
        options["encoder_token"] = IMAGE
    torch.manual_seed(3)
    model = fuse(tiny_decoder(), TinyEncoder(), arch=arch, encoder_trainable=True, **options)
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.eval()
    none = {"encoder_input": {"x": torch.zeros(*shape, 5)}}
    out = model(text(), **none)
    assert torch.equal(out, model(text()))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.encoder.parameters())
    if shape == (2, 0):
        masked = {**none, "encoder_mask": torch.zeros(2, 0, dtype=torch.bool)}
        assert torch.equal(model(text(), **masked), out)
        logits = [
            generate(model, text(), max_new_tokens=3, temperature=0, **given) for given in (none, {})
        ]
        assert torch.equal(*logits)
    if "encoder_token" in options:
        with pytest.raises(ValueError, match=f"every token {IMAGE} needs one feature, .* and 0 feat"):
            model(text_with_image(), **none)


def test_an_untied_head_is_put_back_too():
    decoder = tiny_decoder()
    before, output = structure(decoder), decoder.output
    with pytest.raises(ValueError, match="No encoder named eye"):
        fuse(
            decoder,
            TinyEncoder(),
            every=2,
            fusion_vocab_size=2,
            fusion_head=True,
            encoder_trainable={"eye": True},
        )
    assert structure(decoder) == before
    assert decoder.output is output


def shares_its_weight(decoder):
    head = nn.Linear(WIDTH, 37, bias=False)
    head.weight = decoder.tok_embeddings.weight
    return head


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: nn.Sequential(d.output), "an nn.Linear with a weight of its own.*got a Sequential"),
        (lambda d: nn.Linear(WIDTH, 41), "the head scores 41 tokens and the embedding has 37"),
        (lambda d: TiedLinear(nn.Embedding(37, WIDTH)), "TiedLinear over tok_embeddings; got a TiedL"),
        (shares_its_weight, "an nn.Linear with a weight of its own"),
    ],
    ids=["sequence", "padded", "tied elsewhere", "shared"],
)
def test_a_head_that_cannot_score_new_tokens_at_their_ids_is_refused(change, complaint):
    decoder = tiny_decoder()
    output = change(decoder)
    del decoder.output
    decoder.output = output
    before = structure(decoder)
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), every=2, fusion_vocab_size=2, fusion_head=True)
    assert structure(decoder) == before
    assert decoder.output is output


@pytest.mark.parametrize("tied", [False, True])
def test_first_values_of_a_head(tied):
    rows = torch.randn(2, WIDTH)
    model = fuse(
        tiny_decoder(tied=tied),
        TinyEncoder(),
        every=2,
        fusion_vocab_size=2,
        fusion_init=rows,
        fusion_head=True,
    )
    h = torch.randn(5, WIDTH)
    out = model.output(h)
    expected = h @ rows.T if tied else out[:, :37].mean(-1, keepdim=True).expand(-1, 2)
    torch.testing.assert_close(out[:, 37:], expected)


def test_width_of_the_features_is_asked_of_the_encoder():
    class Config:
        hidden_size = FEATURE_DIM

    class Foreign(nn.Module):
        config = Config()

        def forward(self, x):
            return x

    assert fuse(tiny_decoder(), Foreign(), every=3).adapter.in_dim == FEATURE_DIM
    with pytest.raises(ValueError, match=r"Linear has no feature_dim, embed_dim or config\.hidden_size"):
        fuse(tiny_decoder(), nn.Linear(5, FEATURE_DIM), every=3)


def test_fusing_twice_is_refused():
    decoder = fuse(tiny_decoder(), TinyEncoder(), every=2).decoder
    with pytest.raises(ValueError, match="fusion_layer would be hidden"):
        fuse(decoder, TinyEncoder(), every=2)


def test_a_decoder_of_another_make_is_named():
    with pytest.raises(ValueError, match="needs a decoder with tok_embeddings.*got a Linear"):
        fuse(nn.Linear(3, 5), TinyEncoder())
    decoder = tiny_decoder()
    decoder.layers[0] = nn.Linear(3, 5)
    with pytest.raises(
        ValueError,
        match="Layer 0 cannot be fused. It is a Linear, which lacks what torchtune's decoder layers have",
    ):
        fuse(decoder, TinyEncoder(), every=1)
    with pytest.raises(ValueError, match="at least one encoder"):
        fuse(tiny_decoder(), {}, every=1)


def test_encoders_with_and_without_adapters_do_not_mix():
    with pytest.raises(ValueError, match="an adapter to all encoders or to none"):
        fuse(
            tiny_decoder(),
            {"a": TinyEncoder(), "b": TinyEncoder()},
            every=1,
            adapter={"a": "linear", "b": None},
        )


@pytest.mark.parametrize(
    "options", [{"every": 1}, {"arch": "joint_decoder", "placement": "prefix"}], ids=str
)
def test_a_fused_model_is_no_decoder(options):
    vision = TinyEncoder()
    model = fuse(tiny_decoder(), vision, every=2)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="a DeepFusionModel, fused already.*encoder={name: module}"):
        fuse(model, TinyEncoder(seed=9), **options)
    with pytest.raises(ValueError, match="fused already"):
        EarlyFusionModel(model, TinyEncoder(seed=9), IMAGE)
    assert model.encoder is vision
    assert list(model.state_dict()) == before


def test_a_decoder_keeps_its_own_attributes_of_the_same_names():
    decoder = tiny_decoder()
    decoder.adapter, decoder.strategy = "own", "own too"
    model = fuse(decoder, TinyEncoder(), every=2)
    assert set(model._modules) == {"decoder", "encoder", "adapter"}
    assert (decoder.adapter, decoder.strategy) == ("own", "own too")


def test_caches_before_fusion_are_refused():
    decoder = tiny_decoder()
    decoder.setup_caches(2, torch.float32)
    with pytest.raises(ValueError, match="The decoder has caches.*delete_kv_caches"):
        fuse(decoder, TinyEncoder(), every=2)


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_names_that_no_parameter_can_have_are_refused(name):
    with pytest.raises(ValueError, match="Names of encoders become parts of parameter names"):
        fuse(tiny_decoder(), {name: TinyEncoder()}, every=2)


def test_a_refused_fusion_leaves_the_adapter_as_it_was():
    adapter = nn.Linear(FEATURE_DIM, WIDTH)
    with pytest.raises(ValueError, match="every=99"):
        fuse(tiny_decoder(), TinyEncoder(), adapter=adapter, every=99)
    with pytest.raises(ValueError, match="No encoder named nose"):
        fuse(tiny_decoder(), TinyEncoder(), adapter=adapter, every=1, encoder_trainable={"nose": True})
    assert not hasattr(adapter, "fusion_params")


@pytest.mark.parametrize("quantize", [False, True])
def test_a_decoder_with_lora_everywhere(quantize):
    from torchtune.models.llama3_2 import lora_llama3_2

    decoder = lora_llama3_2(
        ["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        vocab_size=37,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        embed_dim=128,  # the smallest that NF4's blocks fit
        intermediate_dim=256,
        max_seq_len=29,
        lora_rank=3,
        lora_alpha=5,
        quantize_base=quantize,
    )
    model = fuse(decoder, TinyEncoder(), every=2)
    assert model.layers[1].fusion_layer.mlp.w1.weight.shape == (256, 128)
    assert model(text(), encoder_input=inputs()).shape == (2, 13, 37)


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        (MoMaStrategy(pad_id="0"), "MoMaStrategy: pad_id must be an integer or null, got '0'"),
        (MoTStrategy(layers="01"), "MoTStrategy: layers must be a list .* or null, got '01'"),
        (DeepStackStrategy(layers=[True]), r"DeepStackStrategy: layers must be a list .*, got \[True\]"),
    ],
    ids=["moma", "mot", "deepstack"],
)
def test_options_of_a_strategy_that_was_built_by_hand_are_checked(strategy, complaint):
    decoder = tiny_decoder()
    before = list(decoder.state_dict())
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch=strategy)
    assert list(decoder.state_dict()) == before
    fuse(decoder, TinyEncoder(), arch=MoTStrategy(layers=range(2)))
