"""LoRA layers in artifacts, directories, exports, and by name at inference."""

import copy
import json

import pytest
import torch
from checkpoint.parity import assert_close, random_images, random_tokens
from hf import LLAMA, llava, shake
from lora.test_lora import deep, move_lora, outputs, wide
from models.architectures import llama_and_clip
from safetensors.torch import load_file
from support import TinyEncoder, inputs, open_gates, same_state, state, text
from transformers import LlavaForConditionalGeneration

from torchfuse import (
    CheckpointError,
    ConfigError,
    ModelError,
    add_lora,
    export,
    from_pretrained,
    fuse,
    generate,
    load_fusion,
    load_lora,
    load_pretrained,
    merge_lora,
    quantize,
    save_fusion,
    save_pretrained,
    set_lora,
)
from torchfuse.checkpoint import load_trained, save_trained
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.generation.sampling import Sampling
from torchfuse.generation.session import Session
from torchfuse.lora.add import describe_lora
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.params import get_fusion_params, quantized_dtype
from torchfuse.quantization import dequantize

IMAGE = LLAMA["vocab_size"] - 1


def adapted(seed=0, **options):
    model = deep()
    torch.manual_seed(seed)
    add_lora(model, **{"rank": 3, "alpha": 6, "parts": ["decoder", "encoder"], **options})
    return move_lora(model)


def test_an_artifact_has_the_layers_and_not_the_base(tmp_path):
    model = adapted(dora=True)
    save_trained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fusion.safetensors", "fusion.json"}
    described = json.loads((tmp_path / "fusion.json").read_text())
    assert described["lora"] == describe_lora(model)
    assert not any("lora" in name or "magnitude" in name for name in described["base"])
    other = deep()
    add_lora(other, rank=3, alpha=6, parts=["decoder", "encoder"], dora=True)
    load_trained(other, tmp_path)
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (None, r"LoRA rank 3, alpha 6, dropout 0 in 22 layers, the model's is none; load_lora adds"),
        ({"alpha": 7}, r"alpha 6, .* the model's is rank 3, alpha 7"),
        (
            {"parts": ["decoder"]},
            r"in 22 layers, the model's is rank 3, alpha 6, dropout 0 in 21 layers",
        ),
    ],
    ids=["none", "alpha", "layers"],
)
def test_an_artifact_of_other_layers_is_refused(tmp_path, options, complaint):
    save_fusion(adapted(), tmp_path)
    model = deep()
    if options is not None:
        add_lora(model, **{"rank": 3, "alpha": 6, "parts": ["decoder", "encoder"], **options})
    before = state(model)
    with pytest.raises(CheckpointError, match=complaint):
        load_fusion(model, tmp_path)
    assert same_state(before, model)


def test_over_a_quantized_base_what_was_trained_is_saved(tmp_path):
    def qlora():
        model = wide()
        add_lora(model, rank=3, alpha=6, quantize_base=True)
        return model

    model = move_lora(qlora())
    save_trained(model, tmp_path / "run")
    other = qlora()
    load_trained(other, tmp_path / "run")
    assert torch.equal(outputs(other), outputs(model))


def whole(pretrained, **options):
    model = from_pretrained(**pretrained, **{"every": 2, **options}).eval()
    shake(model)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_directory_keeps_the_layers(pretrained, tmp_path, dora):
    model = whole(pretrained)
    add_lora(model, parts=["decoder", "encoder"], rank=3, alpha=6, dora=dora)
    add_lora(model, parts=["fusion"], rank=2, alpha=1.5, dropout=0.25, dora=dora)
    move_lora(model)
    save_pretrained(model, tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out", fusion_trainable=False)
    assert describe_lora(loaded) == describe_lora(model)
    assert same_state(state(model), loaded)
    assert not any(p.requires_grad for p in loaded.parameters())
    merge_lora(loaded)
    save_pretrained(loaded, tmp_path / "merged")
    assert describe_lora(from_pretrained(tmp_path / "merged")) == []


def test_a_quantized_base_is_written_on_request(tmp_path):
    sizes = {"num_heads": 4, "num_kv_heads": 4, "embed_dim": 128, "intermediate_dim": 256}
    decoder = llama_decoder(vocab_size=37, num_layers=2, max_seq_len=53, **sizes)
    model = fuse(decoder.requires_grad_(False), TinyEncoder(), arch="joint_decoder")
    add_lora(model, rank=2, alpha=4, targets=["q_proj"], quantize_base=True)
    with pytest.raises(CheckpointError, match=r"is quantized \(NF4Tensor\): call .*dequantize first"):
        export(model.decoder, tmp_path / "out", format="llama")
    assert not (tmp_path / "out").exists()
    dequantize(model)
    export(model.decoder, tmp_path / "out", format="llama")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_other_formats_get_the_merged_weights(tmp_path, dora):
    llava(tmp_path / "llava")
    model = from_pretrained(tmp_path / "llava").eval()
    add_lora(model, parts=["decoder", "encoder"], rank=3, alpha=6, dora=dora)
    move_lora(model)
    before, tokens, images = (
        state(model),
        random_tokens(IMAGE, rows=2, length=41),
        random_images(2, 3, 12, 12),
    )
    tokens[:, 3:12] = IMAGE
    with torch.no_grad():
        expected = model(tokens, encoder_input={"images": images})
        export(model, tmp_path / "out", format="llava")
        assert same_state(before, model)
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        assert_close(again(input_ids=tokens, pixel_values=images).logits, expected)
    export(model.encoder, tmp_path / "clip", format="clip")
    merge_lora(model)
    written = load_file(tmp_path / "clip" / "model.safetensors")
    export(model.encoder, tmp_path / "clip", format="clip")
    merged = load_file(tmp_path / "clip" / "model.safetensors")
    assert written.keys() == merged.keys() and all(torch.equal(written[n], merged[n]) for n in merged)


def test_torchtunes_format_gets_the_merged_weights(tmp_path):
    decoder, _ = llama_and_clip()
    tower = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=18, num_layers=2, num_heads=3)
    model = open_gates(fuse(decoder, tower, every=2, adapter=None)).eval()
    add_lora(model, parts=["decoder", "encoder", "fusion"], rank=3, alpha=6)
    move_lora(model)
    export(model, tmp_path / "out", format="torchtune")
    loaded = from_pretrained(tmp_path / "out").eval()
    assert describe_lora(loaded) == []
    call = {"encoder_input": {"images": random_images(2, 3, 12, 12)}}
    with torch.no_grad():
        assert_close(loaded(text(), **call), model(text(), **call))


def test_pretrained_parts_are_loaded_below_the_layers(pretrained):
    expected = whole(pretrained)
    model = copy.deepcopy(expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    add_lora(model, parts=["decoder", "encoder"], rank=3, alpha=6, dora=True)
    load_pretrained(model, **pretrained)
    names = dict(expected.named_parameters())
    layer, base = model.layers[0].attn.q_proj, names["decoder.layers.0.attn.q_proj.weight"]
    assert torch.equal(layer.weight, base)
    torch.testing.assert_close(layer.magnitude, base.norm(dim=1))


def test_adapters_are_switched_by_name(tmp_path):
    base = deep()
    models = {"one": adapted(1), "two": adapted(2, rank=2, alpha=5, dora=True, targets=["q_proj", "*0"])}
    with torch.no_grad():
        for parameter in get_fusion_params(models["two"]).values():
            parameter.add_(0.05)
    for name, model in models.items():
        save_trained(model, tmp_path / name)
    expected = {name: outputs(model) for name, model in {None: base, **models}.items()}
    assert len({value.sum().item() for value in expected.values()}) == 3

    model = deep()
    before, parameters = state(model), dict(model.named_parameters())
    for name in models:
        load_lora(model, tmp_path / name, name)
        assert torch.equal(outputs(model), expected[name])
    for name in ("one", None, "two", "one", "two", None):
        set_lora(model, name)
        assert torch.equal(outputs(model), expected[name])
        assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    assert same_state(before, model)
    set_lora(model, "two")
    assert same_state(state(models["two"]), model)
    call = {"encoder_input": inputs(), "max_new_tokens": 4, "temperature": 0}
    assert torch.equal(generate(model, text(), **call), generate(models["two"], text(), **call))
    other = copy.deepcopy(model)
    set_lora(other, None)
    assert torch.equal(outputs(other), expected[None]) and torch.equal(outputs(model), expected["two"])

    with pytest.raises(ConfigError, match="no adapter 'three'; there are one, two"):
        set_lora(model, "three")
    with pytest.raises(ConfigError, match="There is an adapter 'one' already"):
        load_lora(model, tmp_path / "one", "one")
    save_fusion(base, tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no LoRA layers; load_fusion loads it"):
        load_lora(model, tmp_path / "none", "none")
    with torch.no_grad():
        base.layers[0].attn.q_proj.weight.add_(1)
    changed = state(base)
    with pytest.raises(
        CheckpointError, match=r"decoder\.layers\.0\.attn\.q_proj\.weight is .* other values"
    ):
        load_lora(base, tmp_path / "one", "one")
    assert same_state(changed, base)
    merge_lora(model)
    with pytest.raises(ConfigError, match="added or merged since load_lora"):
        set_lora(model, "one")


def test_adapters_keep_what_the_base_has_become(tmp_path):
    """Layers of an adapter that is not active have the weights of the model, in its dtype, quantized."""
    adapted = wide()
    add_lora(adapted, rank=2, alpha=4)
    save_fusion(move_lora(adapted), tmp_path)
    model = wide()
    load_lora(model, tmp_path, "one")
    set_lora(model, None)
    quantize(model, "nf4", head=False)
    expected = outputs(model)
    set_lora(model, "one")
    assert quantized_dtype(model.layers[0].attn.q_proj.weight) == "nf4"
    assert (outputs(model) - outputs(adapted)).norm() < (outputs(model) - expected).norm()
    merge_lora(model)
    assert quantized_dtype(model.layers[0].attn.q_proj.weight) is None


def test_adapters_are_not_switched_in_the_middle_of_a_sequence(tmp_path):
    save_fusion(adapted(1), tmp_path)
    model = deep()
    load_lora(model, tmp_path, "one")
    with Session(model, batch_size=2, max_tokens=30, max_features=7) as session:
        turn = {"encoder_embeds": model.encode(inputs()), "max_new_tokens": 3}
        session.answer(text(2, 5), **turn)
        for switch in (lambda: set_lora(model, None), lambda: load_lora(model, tmp_path, "two")):
            with pytest.raises(ModelError, match="hold keys and values of the present layers: reset or"):
                switch()
        session.reset()
        set_lora(model, None)
        answer, _ = session.answer(text(2, 5), **turn, sampling=Sampling(temperature=0))
    call = {"encoder_input": inputs(), "max_new_tokens": 3, "temperature": 0}
    assert torch.equal(answer, generate(deep(), text(2, 5), **call)[:, 5:])


def test_layers_that_a_model_has_are_its_first_adapter(tmp_path):
    save_trained(adapted(1), tmp_path)
    model = adapted(2)
    expected = outputs(model)
    load_lora(model, tmp_path, "other")
    assert torch.equal(outputs(model), outputs(adapted(1)))
    set_lora(model, "default")
    assert torch.equal(outputs(model), expected)
