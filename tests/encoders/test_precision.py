"""Encoder, adapter and decoder of different dtypes: inputs are cast to the dtype of each part."""

import pytest
import torch
from support import FEATURE_DIM, IMAGE, WIDTH, open_gates, tiny_decoder
from torch import nn

from torchfuse import fuse, get_fusion_params, set_trainable
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.encoders.frames import FrameEncoder
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.modules.adapters import build_adapter

ARCHS = {
    "cross_attention": {"every": 1},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}
HALF, FULL = torch.bfloat16, torch.float32
N, POOLED = 9, 4


class Patches(nn.Module):
    feature_dim = FEATURE_DIM

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURE_DIM, 4, 4)

    def forward(self, images):
        return self.conv(images).flatten(2).transpose(1, 2)


def tower():
    return ClipVisionEncoder(
        image_size=12, patch_size=4, embed_dim=FEATURE_DIM + 1, num_layers=2, num_heads=3
    )


ENCODERS = {
    "clip": tower,
    "frames": lambda: FrameEncoder(Patches()),
    "random": lambda: RandomEncoder(N, FEATURE_DIM),
}
ADAPTERS = {
    "mlp_2layer": {},
    "avgpool": {"window": 2, "grid": 3},
    "attentional_pool": {"window": 3, "num_heads": 1, "grid": 3},
}


def make(arch, encoder, decoder_dtype, encoder_dtype, adapter="avgpool", adapter_dtype=None):
    torch.manual_seed(3)
    eye = ENCODERS[encoder]().to(encoder_dtype)
    decoder = tiny_decoder().to(decoder_dtype)
    built = build_adapter(adapter, eye.feature_dim, WIDTH, **ADAPTERS[adapter])
    model = fuse(decoder, eye, adapter=built.to(adapter_dtype or decoder_dtype), **ARCHS[arch])
    return open_gates(model) if arch == "cross_attention" else model


def images(dtype=FULL):
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7)).to(dtype)


def prompt(arch, num):
    tokens = torch.randint(1, 37, (2, 13), generator=torch.Generator().manual_seed(3))
    if arch == "placeholder":
        tokens[:, 1 : 1 + num] = IMAGE
    return tokens


def record_dtypes(model):
    """The dtypes of inputs and outputs of encoder and adapter, filled as they are called."""
    dtypes = {}

    def note(name):
        def hook(module, args, kwargs, out):
            given = [*args, *kwargs.values()]
            tensors = [v for v in given if torch.is_tensor(v) and v.is_floating_point()]
            dtypes[name] = (*{t.dtype for t in tensors}, out.dtype)

        return hook

    model.encoder.register_forward_hook(note("encoder"), with_kwargs=True)
    model.adapter.register_forward_hook(note("adapter"), with_kwargs=True)
    return dtypes


@pytest.mark.parametrize("pixels", [HALF, FULL], ids=["bf16_pixels", "fp32_pixels"])
@pytest.mark.parametrize("adapter_dtype", [HALF, FULL], ids=["bf16_adapter", "fp32_adapter"])
@pytest.mark.parametrize("dtypes", [(HALF, FULL), (FULL, HALF)], ids=["bf16_decoder", "fp32_decoder"])
@pytest.mark.parametrize("encoder", ["clip", "frames"])
def test_each_part_computes_in_its_own_dtype(encoder, dtypes, adapter_dtype, pixels):
    decoder_dtype, encoder_dtype = dtypes
    model = make("prefix", encoder, decoder_dtype, encoder_dtype, adapter_dtype=adapter_dtype)
    recorded, x = record_dtypes(model), images(pixels)
    embeds = model.encode({"images": x})
    assert recorded == {
        "encoder": (encoder_dtype, encoder_dtype),
        "adapter": (adapter_dtype, adapter_dtype),
    }
    by_hand = model.adapter(model.encoder(images=x.to(encoder_dtype)).to(adapter_dtype))
    assert embeds.dtype == decoder_dtype
    assert torch.equal(embeds, by_hand.to(decoder_dtype))


# Every architecture, encoder and adapter, but not every combination.
CASES = {(arch, "clip", "avgpool") for arch in ARCHS}
CASES |= {("prefix", encoder, "avgpool") for encoder in ENCODERS}
CASES |= {("prefix", "clip", adapter) for adapter in ADAPTERS}


@pytest.mark.parametrize("dtypes", [(HALF, FULL), (FULL, HALF)], ids=["bf16_decoder", "fp32_decoder"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("arch", "encoder", "adapter"), sorted(CASES))
def test_mixed_parts_train_and_agree_with_full_precision(arch, encoder, adapter, autocast, dtypes):
    decoder_dtype, encoder_dtype = dtypes
    num = make(arch, encoder, FULL, FULL, adapter).adapter.output_num_tokens(N)
    tokens, given = prompt(arch, num), {"encoder_input": {"images": images()}}
    expected = make(arch, encoder, FULL, FULL, adapter)(tokens, **given)
    model = make(arch, encoder, decoder_dtype, encoder_dtype, adapter)
    set_trainable(model, encoder=encoder != "random")
    with torch.autocast("cpu", HALF, enabled=autocast):
        assert model.encode(given["encoder_input"]).dtype == decoder_dtype
        out = model(tokens, **given)
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.15)
    out.float().square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    parameters = dict(model.named_parameters())
    assert get_fusion_params(model).keys() <= gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == parameters[name].dtype and gradient.isfinite().all(), name
    for part in ("adapter.", "encoder.") if encoder != "random" else ("adapter.",):
        assert any(g.any() for n, g in gradients.items() if n.startswith(part))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_frozen_encoder_of_full_precision_keeps_its_precision(autocast):
    # Without autocast the encoder computes in its own precision, whatever the decoder's.
    model = make("prefix", "clip", HALF, FULL, adapter_dtype=FULL)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    given = {}
    model.adapter.register_forward_hook(lambda m, args, out: given.update(features=args[0]))
    with torch.autocast("cpu", HALF, enabled=autocast):
        model.encode({"images": images()})
    exact = model.encoder(images())
    assert torch.equal(given["features"], exact) != autocast
    assert not given["features"].requires_grad
