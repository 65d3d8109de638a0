"""All architectures start from a text-only checkpoint, and from the trained adapter of another one."""

import pytest
import torch
from hf import LLAMA, VISION, clip_tower, fused_model, llama
from models.architectures import move, two_encoders
from ranks import run_on_ranks
from support import inputs, same_state, state, tiny_decoder
from torch import nn

from torchfuse import (
    from_pretrained,
    fuse,
    fusion_state_dict,
    get_fusion_params,
    load_fusion,
    load_pretrained,
    save_fusion,
    seed_adapters,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.errors import CheckpointError
from torchfuse.models import build_vlm_wrapper
from torchfuse.models.decoders.llama import llama_decoder
from torchfuse.training import shard

ARCHS = {
    "joint_decoder": {"placement": "prefix"},
    "cross_attention": {"every": 2},
    "mot": {},
    "moma": {"num_experts": 2},
    "deepstack": {},
}
OTHERS = [arch for arch in ARCHS if arch != "joint_decoder"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    llama(folder / "llama")
    clip_tower(folder / "clip")
    return folder


def make(arch, **options):
    """A model with new random weights at each call."""
    return fused_model(arch=arch, **{"every": None, **ARCHS[arch], **options}).eval()


def loaded(arch, pretrained, **options):
    model = make(arch, **options)
    load_pretrained(model, decoder=pretrained / "llama", encoder=pretrained / "clip")
    return model


def trained(pretrained, **options):
    """A joint decoder whose adapter has changed."""
    model = loaded("joint_decoder", pretrained, **options)
    with torch.no_grad():
        for parameter in get_fusion_params(model).values():
            parameter.add_(torch.randn_like(parameter))
    return model


def decoder_alone(pretrained):
    decoder = llama_decoder(
        vocab_size=LLAMA["vocab_size"],
        num_layers=LLAMA["num_hidden_layers"],
        num_heads=LLAMA["num_attention_heads"],
        num_kv_heads=LLAMA["num_key_value_heads"],
        embed_dim=LLAMA["hidden_size"],
        max_seq_len=LLAMA["max_position_embeddings"],
        intermediate_dim=LLAMA["intermediate_size"],
    )
    load_pretrained(decoder, decoder=pretrained / "llama")
    return decoder.eval()


def tokens():
    return torch.randint(1, 37, (2, 13), generator=torch.Generator().manual_seed(3))


def images():
    side = VISION["image_size"]
    return {"images": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))}


@pytest.mark.parametrize("arch", ARCHS)
def test_a_text_only_checkpoint_warm_starts_every_architecture(arch, pretrained):
    expected = decoder_alone(pretrained)(tokens())
    model = make(arch)
    assert not torch.allclose(model(tokens()), expected, rtol=1e-2)
    load_pretrained(model, decoder=pretrained / "llama")
    assert torch.equal(model(tokens()), expected)
    both = from_pretrained(
        decoder=pretrained / "llama", encoder=pretrained / "clip", arch=arch, **ARCHS[arch]
    )
    assert torch.equal(both.eval()(tokens()), expected)
    out = both(tokens(), encoder_input=images())
    assert out.isfinite().all()
    assert torch.equal(out, expected) == (arch == "cross_attention")  # whose gates start at zero


@pytest.mark.parametrize("arch", ARCHS)
def test_a_wrapper_built_from_configurations_is_loaded_from_directories(arch, pretrained, tmp_path):
    numbers = {
        "vocab_size": LLAMA["vocab_size"],
        "num_layers": LLAMA["num_hidden_layers"],
        "num_heads": LLAMA["num_attention_heads"],
        "num_kv_heads": LLAMA["num_key_value_heads"],
        "embed_dim": LLAMA["hidden_size"],
        "max_seq_len": LLAMA["max_position_embeddings"],
        "intermediate_dim": LLAMA["intermediate_size"],
    }
    tower = {"type": "hf", "path": str(pretrained / "clip"), "options": {"keep_cls": False}}
    model = build_vlm_wrapper(numbers, tower, {}, {"arch": arch, **ARCHS[arch]}).eval()
    assert all(p.isnan().all() for p in model.vision_encoder.parameters())
    load_pretrained(model, decoder=pretrained / "llama", encoder=pretrained / "clip")
    assert torch.equal(model(None, tokens())[0], decoder_alone(pretrained)(tokens()))
    save_fusion(trained(pretrained), tmp_path)
    fused = model.fused
    assert seed_adapters(model, tmp_path, strict=False) == [
        n for n in get_fusion_params(fused) if n.startswith("adapter.")
    ]
    logits, _ = model(images()["images"], tokens())
    assert torch.equal(logits, fused(tokens(), encoder_input={"pixel_values": images()["images"]}))
    assert logits.isfinite().all()


@pytest.mark.parametrize("arch", OTHERS)
def test_an_adapter_of_a_joint_decoder_seeds_every_other(arch, pretrained, tmp_path):
    source = trained(pretrained)
    save_fusion(source, tmp_path)
    model = loaded(arch, pretrained)
    before = state(model)
    names = seed_adapters(model, tmp_path)
    assert names == [n for n in get_fusion_params(model) if n.startswith("adapter.")]
    assert names == list(fusion_state_dict(source))
    after, learned = model.state_dict(), fusion_state_dict(source)
    assert all(torch.equal(after[name], learned[name]) for name in names)
    assert [n for n in before if not torch.equal(before[n], after[n])] == names
    assert torch.equal(model.encode(images()), source.encode(images()))
    assert torch.equal(model(tokens()), source(tokens()))


def test_adapters_of_named_encoders_go_by_their_names(tmp_path):
    source = move(fuse(tiny_decoder(), two_encoders(), arch="joint_decoder", placement="prefix"))
    model = fuse(tiny_decoder(), two_encoders(), arch="mot")
    save_fusion(source, tmp_path)
    names = seed_adapters(model, tmp_path)
    assert names == [n for n in get_fusion_params(model) if n.startswith("adapters.")]
    assert {name.split(".")[1] for name in names} == {"eye", "ear"}
    given = {"eye": inputs(), "ear": inputs(num=3)}
    got, expected = model.encode(given), source.encode(given)
    assert all(torch.equal(got[name], expected[name]) for name in given)


def test_a_seeded_deepstack_equals_its_joint_decoder(pretrained, tmp_path):
    """Its new layers start at zero, so that the adapter works at once."""
    source = trained(pretrained)
    save_fusion(source, tmp_path)
    model = loaded("deepstack", pretrained)
    call = {"encoder_input": images()}
    assert not torch.allclose(model(tokens(), **call), source(tokens(), **call), rtol=1e-2)
    seed_adapters(model, tmp_path)
    assert torch.equal(model(tokens(), **call), source(tokens(), **call))


@pytest.mark.parametrize("arch", OTHERS)
def test_a_whole_artifact_of_another_architecture_is_refused(arch, pretrained, tmp_path):
    save_fusion(trained(pretrained), tmp_path)
    model = loaded(arch, pretrained)
    before = state(model)
    with pytest.raises(CheckpointError, match=f"architecture 'joint_decoder', the model's is '{arch}'"):
        load_fusion(model, tmp_path)
    assert same_state(before, model)
    skipped = load_fusion(model, tmp_path, strict=False)
    assert not any(name.startswith("adapter.") for name in skipped.missing)
    assert len(skipped.missing) == len(get_fusion_params(model)) - 4


def test_adapters_that_do_not_fit_are_all_named_and_nothing_changes(pretrained, tmp_path):
    save_fusion(trained(pretrained, adapter="linear"), tmp_path / "linear")
    model = loaded("mot", pretrained)
    before = state(model)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)adapters of .*linear do not fit this model; nothing was loaded.*missing in the "
        r"artifact: adapter\.linear_1\.weight \[24, 20\].*missing in the model: adapter\.linear\.weight",
    ):
        seed_adapters(model, tmp_path / "linear")
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        seed_adapters(model, tmp_path / "linear", strict=False)
    narrow = nn.Sequential(nn.Linear(20, 7), nn.Linear(7, 24))
    save_fusion(fused_by_hand(narrow), tmp_path / "narrow")
    wide = fused_by_hand(nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 24)), arch="mot")
    with pytest.raises(
        CheckpointError, match=r"shape: adapter\.0\.weight is \[7, 20\], the model's is \[5, 2"
    ):
        seed_adapters(wide, tmp_path / "narrow")
    assert seed_adapters(wide, tmp_path / "narrow", strict=False) == ["adapter.1.bias"]
    assert torch.equal(wide.adapter[1].bias, narrow[1].bias)
    assert same_state(before, model)


def fused_by_hand(adapter, arch="joint_decoder"):
    torch.manual_seed(7)
    decoder = llama_decoder(
        vocab_size=37,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        embed_dim=24,
        max_seq_len=31,
        intermediate_dim=41,
    )
    encoder = ClipVisionEncoder(image_size=12, patch_size=4, embed_dim=20, num_layers=2, num_heads=5)
    return fuse(decoder, encoder, arch=arch, adapter=adapter, placement="prefix")


def test_an_artifact_without_an_adapter_is_named(pretrained, tmp_path):
    model = loaded("mot", pretrained)
    model.adapter = None
    save_fusion(model, tmp_path)
    other = loaded("moma", pretrained)
    with pytest.raises(CheckpointError, match=r"missing in the artifact: adapter\.linear_1\.weight"):
        seed_adapters(other, tmp_path)
    with pytest.raises(CheckpointError, match="neither the artifact nor the model has an adapter"):
        seed_adapters(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is no artifact of save_fusion: it has no fusion\.safetensors"
    ):
        seed_adapters(other, tmp_path / "nowhere")
    (tmp_path / "fusion.safetensors").write_bytes(b"{")
    with pytest.raises(CheckpointError, match="is no artifact of save_fusion, or damaged"):
        seed_adapters(other, tmp_path)


def test_another_base_is_refused_if_strict(pretrained, tmp_path):
    save_fusion(trained(pretrained), tmp_path)
    model = loaded("mot", pretrained)
    with torch.no_grad():
        model.encoder.layers[0].mlp.w1.weight.mul_(1.5)
    before = state(model)
    with pytest.raises(
        CheckpointError, match=r"encoder\.layers\.0\.mlp\.w1\.weight is .* with other values"
    ):
        seed_adapters(model, tmp_path)
    assert same_state(before, model)
    assert len(seed_adapters(model, tmp_path, strict=False)) == 4


def sharded(rank, pretrained, artifact):
    model = loaded("mot", pretrained, on_missing="participate")
    shard(model)
    assert len(seed_adapters(model, artifact)) == 4
    alone = loaded("mot", pretrained)
    seed_adapters(alone, artifact)
    whole = {n: p.full_tensor() for n, p in model.named_parameters() if n.startswith("adapter.")}
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in whole.items())


@pytest.mark.distributed
def test_a_sharded_model_is_seeded(pretrained, tmp_path):
    save_fusion(trained(pretrained), tmp_path)
    run_on_ranks(sharded, pretrained, tmp_path)
