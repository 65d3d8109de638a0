"""Documents of packed rows through ``flex_attention``, against the dense mask.

Without CUDA it runs uncompiled, and forward only: a kernel for the backward pass exists on CUDA alone.
"""

import pytest
import torch
from models.architectures import every_arch
from models.test_documents import call, packed, packed_model
from support import tiny_decoder
from torch.nn.attention.flex_attention import flex_attention

from torchfuse.modules import document_attention, documents
from torchfuse.training import next_token_loss

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def blocks(monkeypatch, device):
    """A function that turns attention by blocks on or off, and the calls of it."""
    calls = []
    kernel = flex_attention if device == "cpu" else torch.compile(flex_attention)

    def attention():
        calls.append(1)
        return kernel

    monkeypatch.setattr(document_attention, "_compiled_attention", attention)

    def turn(on):
        for module in (documents, document_attention):
            monkeypatch.setattr(module, "has_block_kernel", lambda device: on)
        return calls

    return turn


def run(model, batch):
    """Logits, and gradients where attention by blocks has them."""
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(batch["tokens"].is_cuda):
        logits = model(**call(batch))
        if logits.requires_grad:
            next_token_loss(logits, batch["labels"])[0].backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@devices
@every_arch
def test_logits_and_gradients_are_those_of_the_dense_mask(name, device, blocks):
    model = packed_model(name, decoder=tiny_decoder(embed_dim=48)).eval().to(device)
    batch = {key: _to(value, device) for key, value in packed(name).items()}
    calls = blocks(False)
    expected = run(model, batch)
    assert not calls
    blocks(True)
    found = run(model, batch)
    assert calls
    tolerance = 1e-5 if device == "cpu" else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@devices
def test_what_the_kernel_does_not_compute_uses_the_dense_mask(device, blocks):
    mask = torch.ones(2, 7, 7, dtype=torch.bool, device=device).tril()
    calls = blocks(True)
    masked = documents.with_block_kernel(mask)
    assert isinstance(masked, documents.DocumentMask)
    heads_too_small = torch.randn(2, 3, 7, 6, device=device)
    other_rows = torch.randn(1, 3, 7, 16, device=device)
    for x in (heads_too_small, other_rows):
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, masked[:1, None])
        expected = torch.nn.functional.scaled_dot_product_attention(x, x, x, mask[:1, None])
        assert torch.equal(attended, expected)
    x = torch.ones(2, 3, 7, 16, device=device)
    dropped = torch.nn.functional.scaled_dot_product_attention(x, x, x, masked[:, None], dropout_p=0.5)
    assert dropped.unique().numel() > 1
    assert not calls


def _to(value, device):
    if isinstance(value, dict):
        return {key: _to(each, device) for key, each in value.items()}
    return value.to(device)
