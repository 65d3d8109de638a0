"""Small models of every architecture, and checks that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import FEATURES, IMAGE, VOCAB, TinyEncoder, inputs, text, tiny_decoder
from torch import Tensor, nn

from torchfuse import (
    from_pretrained,
    fuse,
    get_fusion_params,
    quantize,
    save_pretrained,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models.decoders.llama import llama_decoder

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
LAYOUTS: dict[str, dict[str, Any]] = {"prefix": {}, "placeholder": PLACEHOLDER}
TWO = {"eye": IMAGE, "ear": IMAGE + 1}

EXPERTS = {"arch": "moma", "num_experts": 2, "num_text_experts": 2}
# Every architecture in every layout.
ARCHS: dict[str, dict[str, Any]] = {
    "cross_attention": {"every": 1},
    "prefix": {"arch": "joint_decoder"},
    "placeholder": {"arch": "joint_decoder", **PLACEHOLDER},
    "mot": {"arch": "mot"},
    "mot_placeholder": {"arch": "mot", **PLACEHOLDER},
    "moma": EXPERTS,
    "moma_placeholder": {**EXPERTS, **PLACEHOLDER},
    "deepstack": {"arch": "deepstack"},
    "deepstack_placeholder": {"arch": "deepstack", **PLACEHOLDER},
}
every_arch = pytest.mark.parametrize("name", ARCHS)
ROUTED = ["mot", "moma", "deepstack"]  # with weights of their own for features in the layers


# --- models --------------------------------------------------------------------------------------


def in_place(name: str) -> bool:
    """Whether features replace placeholders in one of ``ARCHS``."""
    return "encoder_token" in ARCHS[name]


def fresh(name: str, *, decoder: Any = None, encoder: Any = None, **options: Any) -> Any:
    """One of ``ARCHS`` as it is fused, with a trainable encoder."""
    options = {"encoder_trainable": True, **ARCHS[name], **options}
    return fuse(decoder or tiny_decoder(), encoder or TinyEncoder(), **options)


def make(name: str, **options: Any) -> Any:
    """One of ``ARCHS`` whose new weights are no copies and not zero."""
    return move(fresh(name, **options))


@torch.no_grad()
def move(model: nn.Module, scale: float = 0.3, only: str = "") -> nn.Module:
    """Add noise to new weights, so that features outweigh the embeddings."""
    generator = torch.Generator().manual_seed(23)
    for name, parameter in get_fusion_params(model).items():
        if only in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def prompt(name: str, batch: int = 2, length: int = 13, start: int = 2) -> Tensor:
    """Text; for a layout or one of ``ARCHS`` with placeholders, as many of them from ``start`` on."""
    tokens = text(batch, length)
    if name.endswith("placeholder"):
        tokens[:, start : start + FEATURES] = IMAGE
    return tokens


def labels_of(tokens: Tensor) -> Tensor:
    return tokens.masked_fill(tokens == IMAGE, -100)


# --- several images of several encoders ----------------------------------------------------------


def two_encoders() -> dict[str, nn.Module]:
    return {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}


def rows_of_images() -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """Rows with two images, one, none, and a second encoder's among them."""
    tokens = text(4, 14)
    tokens[0, 1:7], tokens[0, 9:11] = IMAGE, IMAGE + 1
    tokens[1, 5:8], tokens[3, 2:5] = IMAGE, IMAGE
    tokens[3, 5:7] = IMAGE + 1
    eye = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    ear = torch.tensor([[1, 1], [0, 0], [0, 0], [1, 1]]).bool()
    return tokens, {"eye": inputs(4, 6), "ear": inputs(4, 2)}, {"eye": eye, "ear": ear}


def equals_its_rows(together: Tensor, model: nn.Module) -> None:
    """Compare the logits of ``rows_of_images`` with those of each row alone."""
    tokens, given, masks = rows_of_images()
    for row in range(4):
        one = slice(row, row + 1)
        own = {n: {"x": given[n]["x"][one][:, masks[n][row]]} for n in given if masks[n][row].any()}
        alone = model(tokens[one], encoder_input=own)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


# --- building ------------------------------------------------------------------------------------


def refused(arch: str, options: dict[str, Any], complaint: str) -> None:
    """Check that options raise an error, and that the decoder is unchanged."""
    decoder = tiny_decoder()
    before = [(name, id(module)) for name, module in decoder.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch=arch, **options)
    assert [(name, id(module)) for name, module in decoder.named_modules()] == before


# --- directories ---------------------------------------------------------------------------------


def llama_and_clip() -> tuple[nn.Module, nn.Module]:
    """Parts that a directory can describe."""
    torch.manual_seed(3)
    numbers = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 18, "intermediate_dim": 29}
    decoder = llama_decoder(vocab_size=VOCAB, num_layers=3, max_seq_len=53, **numbers)
    return decoder, ClipVisionEncoder(
        image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5
    )


def call_with_images(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a model of ``llama_and_clip`` that was fused with these options."""
    tokens = text()
    if "encoder_token" in options:
        tokens[:, 1:10] = IMAGE
    return {"tokens": tokens, "encoder_input": {"images": torch.randn(2, 3, 12, 12)}}


def kept_by_a_directory(model: Any, path: Path, call: dict[str, Any]) -> None:
    """Check that a model is loaded from a directory as it was saved."""
    training = model.training
    save_pretrained(model, path)
    other = from_pretrained(path).train(training)
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.strategy.describe(other.decoder) == model.strategy.describe(model.decoder)
    assert torch.equal(other(**call), model(**call))


def only_the_base_is_quantized(model: nn.Module) -> Tensor:
    """Quantize the decoder to int8, and return logits, which differ but not by much."""
    exact = model(text(), encoder_input=inputs())
    report = quantize(model, "int8_weight_only", parts=("decoder",))
    assert "decoder.layers.0.mlp.w2.weight" in report.quantized
    assert not any("fusion_layer" in name for name in report.quantized)
    assert all(type(p) is nn.Parameter for p in get_fusion_params(model).values())
    out = model(text(), encoder_input=inputs())
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()
    return out
