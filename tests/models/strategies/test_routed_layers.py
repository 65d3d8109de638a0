"""What architectures with weights of their own in the layers share, for each of them."""

import copy

import pytest
import torch
from models.architectures import (
    LAYOUTS,
    PLACEHOLDER,
    ROUTED,
    TWO,
    call_with_images,
    equals_its_rows,
    kept_by_a_directory,
    llama_and_clip,
    move,
    prompt,
    rows_of_images,
    two_encoders,
)
from support import IMAGE, VOCAB, TinyEncoder, inputs, tiny_decoder
from torch import nn

from torchfuse import MixtureFusionModel, fuse, get_fusion_params, load_fusion, save_fusion
from torchfuse.models import build_modality_strategy

every_arch = pytest.mark.parametrize("arch", ROUTED)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
LAYERS = {"mot": "MoTLayer", "moma": "MoMaLayer", "deepstack": "DeepStackLayer"}
# Options in which a model and an artifact may differ.
OTHERWISE = {
    "mot": {"start": "zero"},
    "moma": {"start": "zero", "pad_id": 0, "noise": False},
    "deepstack": {},
}
EXPORTED = {
    "mot": [{"layers": [0, 2]}, {"every": 2, "start": "zero"}, PLACEHOLDER],
    "moma": [
        {"layers": [0], "num_experts": 3, "pad_id": 0, "noise": False},
        {**PLACEHOLDER, "capacity": 0.4},
    ],
    "deepstack": [{"hidden_dim": 7}, {"hidden_dim": 7, **PLACEHOLDER}],
}


def fresh(arch, layout="prefix", *, decoder=None, encoder=None, **options):
    options = {"arch": arch, **LAYOUTS[layout], **options}
    return fuse(decoder or tiny_decoder(), encoder or TinyEncoder(), **options)


@every_arch
def test_several_images_of_several_encoders_equal_their_rows_one_by_one(arch):
    model = move(fresh(arch, "placeholder", encoder=two_encoders(), encoder_token=TWO)).eval()
    tokens, given, masks = rows_of_images()
    equals_its_rows(model(tokens, encoder_input=given, encoder_mask=masks), model)


@every_arch
def test_a_decoder_that_lacks_the_layers_is_refused(arch):
    strategy = build_modality_strategy(arch)
    with pytest.raises(ValueError, match=f'no layer is a {LAYERS[arch]}.*arch="{arch}"'):
        MixtureFusionModel(tiny_decoder(), TinyEncoder(), strategy=strategy)
    decoder = fresh(arch).decoder
    with pytest.raises(ValueError, match="layer 0 has weights for encoder, not for eye; layer 1"):
        MixtureFusionModel(decoder, {"eye": TinyEncoder()}, strategy=strategy)


def test_mot_also_needs_a_norm_for_placeholders():
    strategy = build_modality_strategy("mot", encoder_token=IMAGE)
    with pytest.raises(ValueError, match="no layer is a MoTLayer; the final norm is no MoTNorm"):
        MixtureFusionModel(tiny_decoder(), TinyEncoder(), strategy=strategy)
    decoder, adapter = fresh("mot").decoder, nn.Linear(11, 18)
    with pytest.raises(ValueError, match="no MoTNorm; layer 2 has keys and values only, but"):
        MixtureFusionModel(decoder, TinyEncoder(), strategy=strategy, adapter=adapter)


@every_layout
@every_arch
def test_an_artifact_is_loaded_into_a_model_of_the_same_layout(arch, layout, tmp_path):
    model = move(fresh(arch, layout)).eval()
    other = fresh(arch, layout, **OTHERWISE[arch]).eval()
    save_fusion(model, tmp_path)
    load_fusion(other, tmp_path)
    call = {"encoder_input": inputs()}
    assert torch.equal(other(prompt(layout), **call), model(prompt(layout), **call))
    another = next(name for name in LAYOUTS if name != layout)
    with pytest.raises(ValueError, match="placement '(prefix|placeholder)', the model's is"):
        load_fusion(fresh(arch, another), tmp_path)


@pytest.mark.parametrize(
    ("arch", "options"), [(arch, o) for arch in ROUTED for o in EXPORTED[arch]], ids=str
)
def test_a_directory_holds_the_whole_model(arch, options, tmp_path):
    model = move(fuse(*llama_and_clip(), arch=arch, **options)).eval()
    kept_by_a_directory(model, tmp_path, call_with_images(options))


@every_arch
def test_bf16_stays_bf16_and_a_copy_computes_the_same(arch):
    model = fresh(arch, "placeholder", decoder=tiny_decoder().bfloat16()).eval()
    assert {p.dtype for p in get_fusion_params(model.decoder).values()} == {torch.bfloat16}
    tokens = prompt("placeholder")
    out = model(tokens, encoder_input=inputs())
    assert out.shape == (2, 13, VOCAB)
    assert torch.equal(copy.deepcopy(model)(tokens, encoder_input=inputs()), out)
