"""Options of architectures: the layers that are fused, and options of another architecture."""

from pathlib import Path

import pytest
import yaml
from models.architectures import PLACEHOLDER, ROUTED
from support import LAYERS, TinyEncoder, state, tiny_decoder

from torchfuse import fuse, get_fusion_params
from torchfuse.models import VLMConfig, build_modality_strategy

ARCHS = {
    "cross_attention": {},
    "joint_decoder": {"placement": "prefix"},
    "mot": {},
    "moma": {"num_experts": 2},
    "deepstack": {},
}
every_arch = pytest.mark.parametrize("arch", ARCHS)


def make(arch, decoder=None, **options):
    if arch == "cross_attention":
        options = {"every": 1, **options}
    return fuse(decoder or tiny_decoder(), TinyEncoder(), arch=arch, **{**ARCHS[arch], **options})


@pytest.mark.parametrize("every", [LAYERS + 1, 0])
@pytest.mark.parametrize("arch", ["cross_attention", *ROUTED])
def test_an_every_that_fuses_no_layer_is_refused(arch, every):
    decoder = tiny_decoder()
    before = list(state(decoder))
    with pytest.raises(ValueError, match=f"every={every} fuses no layer of this decoder, which has 3"):
        make(arch, decoder, every=every)
    assert list(decoder.state_dict()) == before
    assert get_fusion_params(make(arch, every=LAYERS - 1))


@every_arch
def test_an_every_without_effect_is_refused(arch):
    decoder = tiny_decoder()
    before = list(state(decoder))
    options = {"layers": [0]}
    complaint = r"layers=\[0\] and every=100 both choose the layers to fuse: give one of them"
    if arch == "joint_decoder":
        options, complaint = {}, "every=100 cannot be given: JointDecoderStrategy fuses no layer"
    with pytest.raises(ValueError, match=complaint):
        make(arch, decoder, every=100, **options)
    assert list(decoder.state_dict()) == before
    assert make(arch, decoder, every=None, **options)


def test_no_config_has_both_every_and_layers():
    sections = [
        yaml.safe_load(file.read_text()).get("model", {})
        for file in (Path(__file__).parents[2] / "recipes" / "configs").rglob("*.yaml")
    ]
    with_every = [section for section in sections if section.get("every") is not None]
    assert with_every
    assert not [section for section in with_every if "layers" in section]


@pytest.mark.parametrize(
    ("arch", "options", "complaint"),
    [
        ("mot", {"qk_norm": True}, "'mot': unknown option 'qk_norm'; it takes .*start"),
        ("moma", {"hidden_dim": 5}, "'moma': unknown option 'hidden_dim'; it takes .*capacity"),
        (
            "joint_decoder",
            {"start": "zero"},
            "'joint_decoder': unknown option 'start'; it takes placeme",
        ),
        ("cross_attention", {"placement": "prefix"}, "'cross_attention': unknown option 'placement'"),
        (
            "deepstack",
            {"capacity": 0.5},
            "'deepstack': unknown option 'capacity'; it takes .*hidden_dim",
        ),
    ],
)
def test_an_option_of_another_architecture_is_refused(arch, options, complaint):
    for build in (lambda: make(arch, **options), lambda: VLMConfig(arch, options)):
        with pytest.raises(ValueError, match=complaint):
            build()
    own = VLMConfig(arch, dict(ARCHS[arch])).strategy
    assert type(own) is type(make(arch).strategy)
    assert own.arch == arch
    assert (
        build_modality_strategy(arch, **(PLACEHOLDER if arch == "mot" else own.options())).arch == arch
    )
