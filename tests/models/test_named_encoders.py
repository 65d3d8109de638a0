"""Several encoders by name: their order is the model's, wherever it matters."""

import pytest
import torch
from models.architectures import ROUTED, move
from support import FEATURES, VOCAB, TinyEncoder, inputs, text, tiny_decoder

from torchfuse import from_pretrained, fuse, get_fusion_params, load_fusion, save_fusion, save_pretrained
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models.decoders.llama import llama_decoder

ARCHS = {"cross_attention": {"every": 1}, "joint_decoder": {}, **{arch: {} for arch in ROUTED}}
every_arch = pytest.mark.parametrize("arch", ARCHS)


def named(arch, order=("eye", "ear")):
    encoders = {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}
    torch.manual_seed(3)
    given = {name: encoders[name] for name in order}
    model = fuse(tiny_decoder(), given, arch=arch, **ARCHS[arch]).eval()
    generator, tensors = torch.Generator().manual_seed(5), get_fusion_params(model)
    with torch.no_grad():
        for name in sorted(tensors):
            tensors[name].add_(torch.randn(tensors[name].shape, generator=generator) * 0.3)
    return model


@every_arch
def test_the_order_of_inputs_does_not_matter_and_that_of_encoders_does(arch):
    model = named(arch)
    given = {"eye": inputs(), "ear": inputs(num=3, seed=9)}
    masks = {"eye": torch.ones(2, FEATURES).bool(), "ear": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()}
    out = model(text(), encoder_input=given, encoder_mask=masks)
    turned = [{name: by_name[name] for name in ("ear", "eye")} for by_name in (given, masks)]
    assert torch.equal(model(text(), encoder_input=turned[0], encoder_mask=turned[1]), out)
    embeds = model.encode(turned[0])
    assert list(embeds) == model.encoder_names == ["eye", "ear"]
    again = model(text(), encoder_embeds=dict(reversed(embeds.items())), encoder_mask=turned[1])
    assert torch.equal(again, out)
    other = named(arch, ("ear", "eye"))
    assert sorted(other.state_dict()) == sorted(model.state_dict())
    other.load_state_dict(model.state_dict())
    reordered = other(text(), encoder_input=given, encoder_mask=masks)
    # In a sequence, later features attend to earlier ones.
    assert torch.allclose(reordered, out, rtol=1e-4, atol=1e-5) == (arch == "cross_attention")


@every_arch
def test_an_artifact_of_another_order_is_refused_where_it_matters(arch, tmp_path):
    save_fusion(named(arch), tmp_path)
    other = named(arch, ("ear", "eye"))
    if arch == "cross_attention":
        assert not any(load_fusion(other, tmp_path))
        return
    with pytest.raises(ValueError, match=r"order \['eye', 'ear'\], the model's is \['ear', 'eye'\]"):
        load_fusion(other, tmp_path)


@every_arch
def test_a_directory_keeps_the_order(arch, tmp_path):
    torch.manual_seed(3)
    numbers = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 18, "intermediate_dim": 29}
    decoder = llama_decoder(vocab_size=VOCAB, num_layers=2, max_seq_len=53, **numbers)
    numbers = {"image_size": 12, "patch_size": 4, "embed_dim": 10, "num_layers": 2, "num_heads": 5}
    encoders = {name: ClipVisionEncoder(**numbers) for name in ("left", "back")}
    model = move(fuse(decoder, encoders, arch=arch, **ARCHS[arch])).eval()
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.encoder_names == ["left", "back"]
    given = {name: {"images": torch.randn(2, 3, 12, 12)} for name in encoders}
    assert torch.equal(again(text(), encoder_input=given), model(text(), encoder_input=given))
