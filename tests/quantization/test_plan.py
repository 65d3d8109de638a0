import pytest
import torch
from hf import VISION
from quantization.models import (
    LINEARS_PER_LAYER,
    distance,
    make,
    quantized_names,
    small,
)
from support import LAYERS, TinyEncoder, tiny_decoder
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from torchfuse import fuse, get_fusion_params, quantize, set_trainable
from torchfuse.encoders.hf import HfEncoder
from torchfuse.errors import ConfigError, ModelError


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


def test_a_tied_head_and_its_table_are_kept():
    model = fuse(tiny_decoder(tied=True), TinyEncoder(), every=2, fusion_vocab_size=2, fusion_head=True)
    result = quantize(model, "int8_weight_only")
    assert len(result.quantized) == LAYERS * LINEARS_PER_LAYER
    assert result.kept == {"decoder.tok_embeddings.weight": "FusionEmbedding, shared with the tied head"}
    assert str(result).splitlines()[1].endswith("shared with the tied head")


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(17, 17), nn.Linear(17, 17), nn.Embedding(5, 17), nn.Linear(17, 5))
    model.requires_grad_(False)
    model[1].weight = model[0].weight
    model[3].weight = model[2].weight
    result = quantize(model, "int8_weight_only")
    assert result.quantized == ("0.weight",) and result.kept == {"2.weight": "Embedding"}
    assert model[1].weight is model[0].weight and model[3].weight is model[2].weight


class Halved(nn.Linear):
    def forward(self, input):
        return super().forward(input) / 2


def test_layers_that_are_not_plain_are_kept():
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
    result = quantize(model, "int8_weight_only")
    assert result.quantized == ("plain.weight",)
    assert result.kept == {
        "halved.weight": "Halved, which has a forward of its own",
        "conv.weight": "Conv2d, not an nn.Linear",
        "lora.weight": "LoRALinear, not an nn.Linear",
        "attention.in_proj_weight": "MultiheadAttention, not an nn.Linear",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear, which has a forward of its own",
    }


def test_encoder_of_transformers():
    tower = HfEncoder(CLIPVisionModel(CLIPVisionConfig(**VISION)), keep_cls=True)
    model = fuse(tiny_decoder(), tower, every=2)
    images = {"pixel_values": torch.randn(2, 3, VISION["image_size"], VISION["image_size"])}
    with torch.no_grad():
        expected = model.encode(images)
        result = quantize(model, "int8_weight_only", parts="encoder")
        assert 0 < distance(model.encode(images), expected) < 0.02
    assert len(result.quantized) == 6 * VISION["num_hidden_layers"]


def check_refused(match, model, scheme="int8_weight_only", *, kind=ModelError, **options):
    """Check the error, and that the model is unchanged."""
    names, before = quantized_names(model), [id(p) for p in model.parameters()]
    with pytest.raises(kind, match=match):
        quantize(model, scheme, **options)
    assert quantized_names(model) == names and [id(p) for p in model.parameters()] == before


def test_unknown_schemes_and_parts_and_parts_without_layers_are_refused():
    check_refused(
        r"no scheme 'int3'; there are int8_weight_only.*no part 'eye'; the model has decoder, encoder\.",
        small(),
        "int3",
        parts=("eye",),
        kind=ConfigError,
    )
    check_refused(r"no part 'fusion'", small(), parts="fusion", kind=ConfigError)
    check_refused(r"name a part \(decoder, encoder\)", small(), parts=(), kind=ConfigError)
    decoder = tiny_decoder().requires_grad_(False)
    match = r"no part 'encoder'; the model has decoder\."
    check_refused(match, decoder, parts="encoder", kind=ConfigError)
    check_refused(
        r"encoder has no layer that int8_dynamic can quantize: encoder\.layers\.0\.weight is kept "
        r"\(\[11, 5\] is not wider than 16\)",
        small(fusion_trainable=False),
        "int8_dynamic",
        parts=("decoder", "encoder"),
    )
    check_refused(r"decoder has no layer that nf4 can quantize.*; and 15 more", small(), "nf4")
    check_refused(r"decoder has no layer .*: no matrix", nn.LayerNorm(5))


def test_trainable_weights_are_refused():
    model = small(decoder_trainable=True)
    check_refused(r"trainable, which .*: decoder\.layers\.0\.attn\.q_proj\.weight.* and 14 more", model)
    model.requires_grad_(False)
    model.layers[2].mlp.w2.weight.requires_grad_(True)
    check_refused(r"\): decoder\.layers\.2\.mlp\.w2\.weight$", model)


def test_quantized_weights_are_not_quantized_again_and_never_trained():
    model = small()
    quantize(model, "int8_weight_only")
    check_refused(r"already quantized: decoder\.layers\.0\.attn\.q_proj\.weight", model)
    check_refused("already quantized", model, "nf4", parts=("encoder", "decoder"))
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        ConfigError, match=r"Quantized weights cannot train: decoder\.layers\.0.*and 14 more"
    ):
        set_trainable(model, decoder=True, fusion=False)
    assert [p.requires_grad for p in model.parameters()] == trainable
    set_trainable(model, encoder=True)


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        layer = nn.Linear(17, 5).requires_grad_(False)
    check_refused(r"on the meta device \(load its values first\): weight", layer)
