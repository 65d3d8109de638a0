import hf
import pytest
import torch
from support import FEATURE_DIM, IMAGE, WIDTH, text, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Siglip2VisionConfig, SiglipVisionConfig, SiglipVisionModel

from torchfuse import fuse
from torchfuse.encoders import registry
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.hf import HfEncoder
from torchfuse.encoders.registry import (
    build_encoder,
    encoder_names,
    pixels_keyword,
    register_encoder,
)
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.errors import CheckpointError, ConfigError, ModelError

CLIP = {"image_size": 12, "patch_size": 4, "embed_dim": 10, "num_layers": 2, "num_heads": 5}
SIZES = {"hidden_size": 20, "intermediate_size": 43, "num_hidden_layers": 2, "num_attention_heads": 5}


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def towers(tmp_path):
    """Directories of towers, as transformers saves them."""
    SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=12, patch_size=4)).save_pretrained(
        tmp_path / "fixed"
    )
    naflex = Siglip2VisionConfig(**SIZES, patch_size=2, num_patches=9)
    naflex.save_pretrained(tmp_path / "naflex")
    hf.clip_tower(tmp_path / "clip")
    return tmp_path


def options_of(name, towers):
    return {
        "clip": CLIP,
        "hf": {"path": towers / "clip", "keep_cls": True},
        "siglip2": {"path": str(towers / "fixed")},
        "random": {"num_tokens": 5, "feature_dim": 7},
    }[name]


@pytest.mark.parametrize(
    ("name", "kind", "dim", "num"),
    [
        ("clip", ClipVisionEncoder, 10, 9),
        ("hf", HfEncoder, 20, 10),
        ("siglip2", HfEncoder, 20, 9),
        ("random", RandomEncoder, 7, 5),
    ],
    ids=["clip", "hf", "siglip2", "random"],
)
def test_attributes_match_the_features(name, kind, dim, num, towers):
    encoder = build_encoder(name, **options_of(name, towers))
    assert isinstance(encoder, kind)
    assert (encoder.feature_dim, encoder.num_tokens) == (dim, num)
    out = encoder(images=torch.randn(2, 3, 3, 12, 12))
    assert out.shape == (2, 3 * num, dim)


def test_a_tower_is_nan_until_it_is_loaded(towers):
    encoder = build_encoder("siglip2", path=towers / "fixed", feature_layer=-2)
    assert all(p.isnan().all() for p in encoder.parameters())
    assert encoder.feature_layer == -2
    naflex = build_encoder("siglip2", path=towers / "naflex")
    assert (naflex.feature_dim, naflex.num_tokens) == (20, None)  # as many as the image has patches


def test_options_that_do_not_fit_are_named(towers):
    with pytest.raises(ConfigError, match="Unknown encoder 'vit'; there are .*clip, .*hf, .*siglip2"):
        build_encoder("vit")
    with pytest.raises(
        ConfigError, match="encoder 'random': unknown option 'width', missing option 'num_"
    ):
        build_encoder("random", width=7, feature_dim=3)
    with pytest.raises(
        ConfigError, match="encoder 'clip': unknown option 'path', missing option 'image_s"
    ):
        build_encoder("clip", path="x")
    with pytest.raises(ConfigError, match="encoder 'hf': missing option 'path'; it takes path"):
        build_encoder("hf")
    with pytest.raises(
        ConfigError, match="encoder 'hf': unknown option 'layer'; it takes feature_layer, k"
    ):
        build_encoder("hf", path="x", layer=2)
    with pytest.raises(
        ConfigError, match="encoder 'hf': feature_layer must be an integer or null, got '2"
    ):
        build_encoder("hf", path="x", feature_layer="2")
    with pytest.raises(
        ConfigError, match="clip holds a 'clip_vision_model', and must hold one of siglip_"
    ):
        build_encoder("siglip2", path=towers / "clip")
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        build_encoder("siglip2", path=towers / "nowhere")


class Patches(nn.Module):
    feature_dim, num_tokens = FEATURE_DIM, 4

    def __init__(self, side=4):
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURE_DIM, side, side)

    def forward(self, images):
        return self.conv(images).flatten(2).transpose(1, 2)


def test_a_new_encoder_takes_one_class_and_one_decorator(names):
    register_encoder("patches")(Patches)
    assert encoder_names() == sorted({*encoder_names(), "patches"})
    encoder = build_encoder("patches", side=4)
    model = fuse(tiny_decoder(), encoder, arch="joint_decoder", encoder_token=IMAGE)
    tokens = text()
    tokens[:, 1 : 1 + encoder.num_tokens] = IMAGE
    embeds = model.encode({"images": torch.randn(2, 3, 8, 8)})
    assert embeds.shape == (2, encoder.num_tokens, WIDTH)
    assert model(tokens, encoder_embeds=embeds).shape[:2] == tokens.shape
    with pytest.raises(ConfigError, match="encoder 'patches': unknown option 'size'; it takes side"):
        build_encoder("patches", size=3)
    with pytest.raises(ConfigError, match="There is an encoder 'patches' already: Patches"):
        register_encoder("patches")(Patches)


def test_an_encoder_must_have_its_sizes(names):
    @register_encoder("sizeless")
    def sizeless(width):
        encoder = nn.Linear(3, 5)
        encoder.feature_dim = width
        return encoder

    @register_encoder("nothing")
    def nothing():
        return None

    with pytest.raises(ConfigError, match="feature_dim must .*, it is 0; num_tokens must .*'missing'"):
        build_encoder("sizeless", width=0)
    with pytest.raises(ConfigError, match="encoder 'nothing', a NoneType, must state"):
        build_encoder("nothing")


def test_the_keyword_of_pixels_is_the_encoders():
    class Keywords(nn.Module):
        def forward(self, **inputs):
            return inputs["pixel_values"]

    assert pixels_keyword(Patches()) == "images"
    assert pixels_keyword(nn.Linear(3, 5)) == "input"
    assert pixels_keyword(checkpoint_wrapper(torch.compile(Patches(), backend="eager"))) == "images"
    with pytest.raises(ModelError, match="Which keyword of Keywords takes pixels is not known"):
        pixels_keyword(Keywords())
    encoder = Keywords()
    encoder.example_input = lambda: {"pixel_attention_mask": 1, "pixel_values": 2}
    assert pixels_keyword(encoder) == "pixel_values"
