"""What tests of architectures whose features stand in the sequence have in common."""

from __future__ import annotations

from collections.abc import Callable
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
    load_fusion,
    quantize,
    save_fusion,
    save_pretrained,
)
from torchfuse.encoders.clip import ClipVisionEncoder
from torchfuse.models.decoders.llama import llama_decoder

PLACEHOLDER = {"placement": "placeholder", "encoder_token": IMAGE}
LAYOUTS: dict[str, dict[str, Any]] = {"prefix": {}, "placeholder": PLACEHOLDER}
TWO = {"eye": IMAGE, "ear": IMAGE + 1}


@torch.no_grad()
def move(model: nn.Module, scale: float = 0.3, only: str = "") -> nn.Module:
    """New weights that are nobody's copies or zero, and features that outweigh the embeddings."""
    generator = torch.Generator().manual_seed(23)
    for name, parameter in get_fusion_params(model).items():
        if only in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def prompt(layout: str, batch: int = 2, length: int = 13, start: int = 2) -> Tensor:
    """Text; where features stand in place of tokens, with as many placeholders from ``start`` on."""
    tokens = text(batch, length)
    if layout == "placeholder":
        tokens[:, start : start + FEATURES] = IMAGE
    return tokens


# --- several images of several encoders ----------------------------------------------------------


def two_encoders() -> dict[str, nn.Module]:
    return {"eye": TinyEncoder(), "ear": TinyEncoder(seed=6)}


def rows_of_images() -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """Two images in a row, one in the middle, none, and a second encoder's among them."""
    tokens = text(4, 14)
    tokens[0, 1:7], tokens[0, 9:11] = IMAGE, IMAGE + 1
    tokens[1, 5:8], tokens[3, 2:5] = IMAGE, IMAGE
    tokens[3, 5:7] = IMAGE + 1
    eye = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    ear = torch.tensor([[1, 1], [0, 0], [0, 0], [1, 1]]).bool()
    return tokens, {"eye": inputs(4, 6), "ear": inputs(4, 2)}, {"eye": eye, "ear": ear}


def equals_its_rows(together: Tensor, model: nn.Module) -> None:
    """What a model said of ``rows_of_images`` is what it says of each row alone."""
    tokens, given, masks = rows_of_images()
    for row in range(4):
        one = slice(row, row + 1)
        mine = {n: {"x": given[n]["x"][one][:, masks[n][row]]} for n in given if masks[n][row].any()}
        alone = model(tokens[one], encoder_input=mine)
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


# --- building ------------------------------------------------------------------------------------


def refused(arch: str, options: dict[str, Any], complaint: str) -> None:
    """Options that do not fit are named, and the decoder is as it was."""
    decoder = tiny_decoder()
    before = [(name, id(module)) for name, module in decoder.named_modules()]
    with pytest.raises(ValueError, match=complaint):
        fuse(decoder, TinyEncoder(), arch=arch, **options)
    assert [(name, id(module)) for name, module in decoder.named_modules()] == before


# --- what is kept --------------------------------------------------------------------------------


def kept_by_an_artifact(
    model: nn.Module, other: nn.Module, layout: str, fresh: Callable[[str], nn.Module], path: Path
) -> None:
    """An artifact of one goes into the other, and into no model of another layout."""
    save_fusion(model, path)
    load_fusion(other, path)
    given = {"encoder_input": inputs()}
    assert torch.equal(other(prompt(layout), **given), model(prompt(layout), **given))
    with pytest.raises(ValueError, match="placement '(prefix|placeholder)', the model's is"):
        load_fusion(fresh(next(name for name in LAYOUTS if name != layout)), path)


def llama_and_clip() -> tuple[nn.Module, nn.Module]:
    """Parts that a directory can describe."""
    torch.manual_seed(3)
    numbers = {"num_heads": 3, "num_kv_heads": 1, "embed_dim": 18, "intermediate_dim": 29}
    decoder = llama_decoder(vocab_size=VOCAB, num_layers=3, max_seq_len=53, **numbers)
    return decoder, ClipVisionEncoder(
        image_size=12, patch_size=4, embed_dim=10, num_layers=2, num_heads=5
    )


def call_with_images(options: dict[str, Any]) -> dict[str, Any]:
    """A call of a model of ``llama_and_clip`` that was fused with these options."""
    tokens = text()
    if "encoder_token" in options:
        tokens[:, 1:10] = IMAGE
    return {"tokens": tokens, "encoder_input": {"images": torch.randn(2, 3, 12, 12)}}


def kept_by_a_directory(model: Any, path: Path, call: dict[str, Any]) -> None:
    """A model comes back from a directory as it was."""
    training = model.training
    save_pretrained(model, path)
    other = from_pretrained(path).train(training)
    assert list(other.state_dict()) == list(model.state_dict())
    assert other.strategy.describe(other.decoder) == model.strategy.describe(model.decoder)
    assert torch.equal(other(**call), model(**call))


def only_the_base_is_quantized(model: nn.Module) -> Tensor:
    """What a model says with its base in int8: another thing, but not by much."""
    exact = model(text(), encoder_input=inputs())
    report = quantize(model, "int8_weight_only", parts=("decoder",))
    assert "decoder.layers.0.mlp.w2.weight" in report.quantized
    assert not any("fusion_layer" in name for name in report.quantized)
    assert all(type(p) is nn.Parameter for p in get_fusion_params(model).values())
    out = model(text(), encoder_input=inputs())
    assert 0 < (out - exact).norm() < 0.05 * exact.norm()
    return out
