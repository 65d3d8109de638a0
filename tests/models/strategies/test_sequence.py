"""Where features go in the decoder's sequence, for all architectures that put them there."""

import json

import pytest
import torch
from models.architectures import LAYOUTS, call_with_images, kept_by_a_directory, llama_and_clip, prompt
from support import IMAGE, TinyEncoder, inputs, text, tiny_decoder

from torchfuse import EarlyFusionModel, fuse, load_fusion, save_fusion
from torchfuse.checkpoint.artifact.fusion import write_artifact
from torchfuse.models import build_modality_strategy, build_vlm_wrapper

IN_SEQUENCE = ["joint_decoder", "mot", "moma", "deepstack"]
every_arch = pytest.mark.parametrize("arch", IN_SEQUENCE)
TOKEN = {"encoder_token": IMAGE}


@every_arch
@pytest.mark.parametrize(
    ("given", "placement"),
    [({}, "prefix"), (TOKEN, "placeholder"), ({"encoder_token": {"eye": 3}}, "placeholder")],
    ids=["no token", "a token", "a token by name"],
)
def test_the_placement_follows_from_the_token(arch, given, placement):
    strategy = build_modality_strategy(arch, **given)
    assert strategy.placement == placement
    assert strategy == build_modality_strategy(arch, **given, placement=None)
    assert strategy == build_modality_strategy(arch, **given, placement=placement)
    assert strategy.options()["placement"] == placement
    assert strategy.extra_tokens(5) == (5 if placement == "prefix" else 0)


@every_arch
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"placement": "placeholder"}, 'placement="placeholder" needs encoder_token'),
        ({"placement": "prefix", **TOKEN}, '"prefix" takes none. Got .*encoder_token=41'),
        ({"placement": "behind"}, "placement must be .*'prefix'.*got 'behind'"),
    ],
    ids=str,
)
def test_a_placement_that_contradicts_the_token_is_refused(arch, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        fuse(tiny_decoder(), TinyEncoder(), arch=arch, **options)


@every_arch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_without_placement_is_the_one_with_it(arch, layout):
    torch.manual_seed(3)
    explicit = {"placement": layout, **(TOKEN if layout == "placeholder" else {})}
    token = {n: v for n, v in explicit.items() if n != "placement"}
    models = []
    for options in (token, explicit):
        torch.manual_seed(3)
        models.append(fuse(tiny_decoder(), TinyEncoder(), arch=arch, **options).eval())
    out, expected = (model(prompt(layout), encoder_input=inputs()) for model in models)
    assert torch.equal(out, expected)


def test_early_fusion_by_hand_without_tokens_has_a_prefix():
    model = EarlyFusionModel(tiny_decoder(), torch.nn.Linear(5, 18), None)
    assert model.strategy.placement == "prefix"


@every_arch
def test_a_wrapper_is_built_with_the_name_alone(arch):
    decoder = {"vocab_size": 37, "num_layers": 3, "num_heads": 3, "num_kv_heads": 1, "embed_dim": 18}
    wrapper = build_vlm_wrapper(
        {**decoder, "max_seq_len": 53, "intermediate_dim": 29},
        {"type": "random", "num_tokens": 7, "feature_dim": 11},
        {"type": "linear"},
        {"arch": arch},
    ).eval()
    assert wrapper.num_image_tokens == 7
    logits, labels = wrapper(torch.zeros(2, 3, 8, 8), text(), labels=text())
    assert logits.shape == (2, 13, 37)
    assert torch.equal(labels, text())


@every_arch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_hold_the_placement_that_was_chosen(arch, layout, tmp_path):
    """So what is written today reads as what was written when a placement had to be given."""
    options = TOKEN if layout == "placeholder" else {}
    model = fuse(*llama_and_clip(), arch=arch, **options).eval()
    kept_by_a_directory(model, tmp_path / "model", call_with_images(options))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["options"]["placement"] == layout
    save_fusion(model, tmp_path / "fusion")
    header = json.loads((tmp_path / "fusion" / "fusion.json").read_text())
    assert header["options"]["placement"] == layout
    load_fusion(fuse(*llama_and_clip(), arch=arch, placement=layout, **options), tmp_path / "fusion")
    # An artifact that names none differs from nothing.
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    header["options"]["placement"] = None
    write_artifact(tmp_path / "silent", tensors, header)
    load_fusion(model, tmp_path / "silent")
