"""Clips of different lengths: padding has no effect, and a clip equals its frames."""

import copy

import pytest
import torch
from support import IMAGE, TinyEncoder, inputs, open_gates, text, tiny_decoder
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from torchfuse import fuse, generate, get_fusion_params
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.frames import FrameEncoder, frame_features_mask, hide_padding
from torchfuse.encoders.hf import HfEncoder
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.modules.adapters import build_adapter

B, F, SIDE, DIM = 3, 4, 12, 10
GRID = 3  # patches along a side of a frame, 2 x 2 tokens after the adapter
TOKENS = 4
REAL = torch.tensor([[True, True, False, False], [True, False, True, True], [False] * 4])
ARCHS = {
    "cross_attention": {"every": 1},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
    "mot": {"arch": "mot"},
    "mot_placeholder": {"arch": "mot", "placement": "placeholder", "encoder_token": IMAGE},
    "moma": {"arch": "moma", "num_experts": 2},
    "moma_placeholder": {
        "arch": "moma",
        "num_experts": 2,
        "placement": "placeholder",
        "encoder_token": IMAGE,
    },
    "deepstack": {"arch": "deepstack"},
    "deepstack_placeholder": {"arch": "deepstack", "placement": "placeholder", "encoder_token": IMAGE},
}


class Patches(nn.Module):
    """An encoder that takes one image a row."""

    feature_dim, num_tokens = DIM, GRID**2

    def __init__(self):
        super().__init__()
        torch.manual_seed(11)
        self.conv = nn.Conv2d(3, DIM, SIDE // GRID, SIDE // GRID)

    def forward(self, images):
        return torch.tanh(self.conv(images)).flatten(2).transpose(1, 2)


def clip_tower():
    torch.manual_seed(13)
    return ClipVisionEncoder(image_size=SIDE, patch_size=4, embed_dim=DIM, num_layers=2, num_heads=5)


def siglip():
    torch.manual_seed(19)
    numbers = {"intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 5}
    config = SiglipVisionConfig(hidden_size=DIM, image_size=SIDE, patch_size=4, **numbers)
    return HfEncoder(SiglipVisionModel(config))


ENCODERS = {
    "one_a_row": lambda: FrameEncoder(Patches()),
    "clip": clip_tower,
    "siglip": siglip,
    "random": lambda: RandomEncoder(GRID**2, DIM, seed=3),
}

# Every architecture and every encoder, but not every pair: neither depends on the other.
CASES = [
    *((arch, "one_a_row") for arch in ARCHS),
    *(("prefix", encoder) for encoder in list(ENCODERS)[1:]),
]
every_case = pytest.mark.parametrize(("arch", "encoder"), CASES, ids=lambda name: name)


def make(arch, encoder="one_a_row"):
    built = ENCODERS[encoder]()
    torch.manual_seed(17)
    adapter = build_adapter("avgpool", DIM, 18, num_tokens=built.num_tokens)
    # In training experts choose among all rows.
    model = fuse(tiny_decoder(), built, adapter=adapter, **ARCHS[arch]).eval()
    if arch.startswith("deepstack"):
        for name, parameter in get_fusion_params(model).items():
            if ".w2." in name:
                nn.init.normal_(parameter, std=0.5)  # at zero it has no effect
    return open_gates(model) if arch == "cross_attention" else model


def clip(seed=5):
    return torch.randn(B, F, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(arch, real=REAL, length=23):
    """Text; for placeholders with as many in front as each row has features."""
    tokens = text(real.shape[0], length)
    if "encoder_token" in ARCHS[arch]:
        at = torch.arange(length) - 1
        tokens[(at >= 0) & (at < real.sum(dim=1, keepdim=True) * TOKENS)] = IMAGE
    return tokens


def call(model, tokens, images, real):
    return model(
        tokens,
        encoder_input={"images": hide_padding(images, real)},
        encoder_mask=frame_features_mask(real, TOKENS),
    )


@every_case
def test_values_in_padded_frames_change_no_bit(arch, encoder):
    model, tokens = make(arch, encoder), prompt(arch)
    images, other = clip(), clip()
    other[0, 2:], other[1, 1], other[2] = float("nan"), float("inf"), 0.7
    outs, grads = [], []
    for pixels in (images, other):
        out = call(model, tokens, pixels, REAL)
        out.square().mean().backward()
        outs.append(out)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)
    assert grads[0].keys() == grads[1].keys() and any(g.any() for g in grads[0].values())
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())
    # The features of real frames do have an effect.
    moved = images.clone()
    moved[1, 2] += 0.5
    out = call(model, tokens, moved, REAL)
    assert not torch.allclose(out[1], outs[0][1])
    assert torch.equal(out[[0, 2]], outs[0][[0, 2]])


@pytest.mark.parametrize("arch", ARCHS)
def test_features_of_padded_frames_are_masked_out(arch):
    model, tokens = make(arch), prompt(arch)
    mask = frame_features_mask(REAL, TOKENS)
    embeds = model.encode({"images": clip()})
    other = torch.where(mask[..., None], embeds, torch.randn_like(embeds))
    out = model(tokens, encoder_embeds=embeds, encoder_mask=mask)
    assert torch.equal(model(tokens, encoder_embeds=other, encoder_mask=mask), out)
    everything = torch.ones_like(mask)
    if "encoder_token" not in ARCHS[arch]:  # placeholders are as many as real features
        assert not torch.allclose(model(tokens, encoder_embeds=other, encoder_mask=everything), out)


@every_case
def test_a_padded_clip_equals_the_clip_without_padding(arch, encoder):
    model, tokens, images = make(arch, encoder), prompt(arch), clip()
    out = call(model, tokens, images, REAL)
    for row in range(B):
        frames = images[row][REAL[row]][None]
        given = {"encoder_input": {"images": frames}} if frames.shape[1] else {}  # a row of text
        alone = model(tokens[row : row + 1], **given)
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@every_case
def test_a_clip_equals_its_frames_as_separate_images(arch, encoder):
    model, images = make(arch, encoder), clip()
    tokens = prompt(arch, torch.ones(B, F, dtype=torch.bool))
    together = model.encode({"images": images})
    one_by_one = torch.cat([model.encode({"images": image}) for image in images.unbind(1)], dim=1)
    assert together.shape == (B, F * TOKENS, 18)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model(tokens, encoder_input={"images": images}),
        model(tokens, encoder_embeds=one_by_one),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_generating_from_a_batch_of_clips_equals_each_alone(arch):
    model, images = make(arch).eval(), clip()
    tokens = prompt(arch)
    together = generate(
        model,
        tokens,
        encoder_input={"images": hide_padding(images, REAL)},
        encoder_mask=frame_features_mask(REAL, TOKENS),
        max_new_tokens=3,
        temperature=0,
    )
    for row in range(B):
        frames = images[row][REAL[row]][None]
        given = {"encoder_input": {"images": frames}} if frames.shape[1] else {}
        alone = generate(model, tokens[row : row + 1], **given, max_new_tokens=3, temperature=0)
        assert torch.equal(together[row : row + 1], alone)


def test_the_wrapper_replaces_padding_and_keeps_names():
    encoder, images = FrameEncoder(Patches()), clip()
    plain = Patches()
    broken = images.masked_fill(~REAL[:, :, None, None, None], float("nan"))
    black = images.masked_fill(~REAL[:, :, None, None, None], 0.0)
    features = encoder(broken, frame_mask=REAL)
    assert torch.equal(features, encoder(black))
    torch.testing.assert_close(features.unflatten(1, (F, -1))[1, 2], plain(images[1, 2:3])[0])
    assert torch.equal(encoder(images[:, 0]), plain(images[:, 0]))  # one image a row
    assert list(encoder.state_dict()) == list(plain.state_dict()) == ["conv.weight", "conv.bias"]
    assert [n for n, _ in encoder.named_parameters()] == ["conv.weight", "conv.bias"]
    assert (encoder.feature_dim, encoder.num_tokens) == (DIM, GRID**2)
    assert torch.equal(copy.deepcopy(encoder)(black), features)


@pytest.mark.parametrize("arch", ["cross_attention", "placeholder", "mot"])
def test_compiles_to_one_graph(arch):
    torch._dynamo.reset()
    model, tokens, images = make(arch), prompt(arch), clip()
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(model, tokens, images, REAL), call(model, tokens, images, REAL), rtol=1e-5, atol=1e-6
    )


def test_the_wrapper_compiles_to_one_graph():
    encoder, images = FrameEncoder(Patches(), min_frames=1), clip()[:2]
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, REAL[:2]), encoder(images, REAL[:2]))


def test_rows_with_too_few_frames_are_named():
    images = clip()
    assert hide_padding(images, None, min_frames=F) is images
    with pytest.raises(ValueError, match=r"at least 5 frames, got images \[3, 4, .*are 4 a row"):
        hide_padding(images, None, min_frames=5)
    hide_padding(images[:2], REAL[:2], min_frames=2)
    with pytest.raises(
        ValueError, match="at least 3 of its 4 frames real .* but row 0 has 2, row 2 has 0"
    ):
        hide_padding(images, REAL, min_frames=3)
    with pytest.raises(ValueError, match=r"row 2 has 0\."):
        FrameEncoder(Patches(), min_frames=1)(images, REAL)
    with pytest.raises(ValueError, match=r"at least 2 frames, .* are 1 a row"):
        FrameEncoder(Patches(), min_frames=2)(images[:, 0])
    many = torch.zeros(11, F, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 7 has 0, and 3 more rows have too few"):
        hide_padding(torch.zeros(11, F, 1), many, min_frames=1)
    compiled = torch.compile(hide_padding, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a row has fewer than 3 real frames"):
        compiled(images, REAL, min_frames=3)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (REAL.int(), r"int32 \[3, 4\]"),
        (REAL[:, :3], r"bool \[3, 3\]"),
        (REAL[0], r"bool \[4\]"),
        (REAL[..., None], r"bool \[3, 4, 1\]"),
    ],
    ids=["int", "frames", "one_row", "axes"],
)
def test_a_mask_that_does_not_fit_is_named(mask, got):
    with pytest.raises(ValueError, match=rf"frame_mask must be bool .*{got} for \[3, 4, 3, 12, 12\]"):
        hide_padding(clip(), mask)
    if mask.dim() != 2 or mask.dtype != torch.bool:
        with pytest.raises(ValueError, match=rf"frame_mask must be bool .*{got} and 5"):
            frame_features_mask(mask, 5)
    with pytest.raises(ValueError, match="num_tokens at least 1, got .* and 0"):
        frame_features_mask(REAL, 0)


def test_encoders_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"takes images \[b, f, c, h, w\], .* got \[3, 12, 12\]"):
        FrameEncoder(Patches())(clip()[:, 0, 0])
    with pytest.raises(
        ValueError, match=r"Flatten must return features \[12, n, d_e\], .* got \[12, 432\]"
    ):
        FrameEncoder(nn.Flatten())(clip())
    with pytest.raises(
        ValueError, match=r"Mean must return features \[12, n, d_e\], .* got \[1, 3, 12\]"
    ):
        FrameEncoder(Mean())(clip())
    with pytest.raises(ValueError, match="An input of Flatten is not known: pass example_input="):
        FrameEncoder(nn.Flatten()).example_input()


class Mean(nn.Module):
    image_size = SIDE

    def forward(self, images):
        return images.mean(dim=(0, 3))[None]


def test_the_example_input_is_the_wrapped_encoders():
    assert FrameEncoder(Mean()).example_input()["images"].shape == (1, 3, SIDE, SIDE)
    assert FrameEncoder(RandomEncoder(5, 7)).example_input()["images"].shape == (1, 3, 1, 1)
    several = FrameEncoder(Mean(), min_frames=2).example_input()["images"]
    assert several.shape == (1, 2, 3, SIDE, SIDE)
    for min_frames in (0, 2):
        encoder = FrameEncoder(TinyImages(), min_frames=min_frames)
        model = fuse(tiny_decoder(), encoder, every=1, on_missing="participate")
        assert torch.equal(model(text()), tiny_decoder()(text()))


class TinyImages(TinyEncoder):
    def forward(self, images):
        return super().forward(images.flatten(1, 2).transpose(1, 2))

    def example_input(self):
        return {"images": torch.zeros(1, 1, self.in_dim, 1)}


def test_without_a_mask_images_are_unchanged():
    x = inputs()["x"]
    assert hide_padding(x, None) is x
    model, tokens, images = make("cross_attention"), prompt("cross_attention"), clip()
    everything = torch.ones(B, F, dtype=torch.bool)
    torch.testing.assert_close(
        call(model, tokens, images, everything), model(tokens, encoder_input={"images": images})
    )
