"""Masks and positions of rows with several documents."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchfuse.modules.documents import (
    document_mask,
    document_positions,
    positions_within,
)
from torchfuse.modules.grouped_attention import grouped_attention

IDS = torch.tensor([[0] * 5 + [1] * 3 + [4] + [-1] * 2, [0] * 11, [2] * 2 + [0] * 9])


def dense():
    """The mask, entry by entry."""
    rows = [[[i >= j and row[i] == row[j] for j in range(11)] for i in range(11)] for row in IDS]
    return torch.tensor(rows)


def heads(num_kv_heads=2):
    generator = torch.Generator().manual_seed(3)
    shapes = [(3, num, 11, 7) for num in (6, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_masks_and_positions_of_documents():
    mask = document_mask(IDS)
    assert torch.equal(mask.as_subclass(Tensor), dense())
    assert mask.attention.lengths == [[5, 3, 1, 2], [11], [2, 9]]
    assert document_positions(IDS)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1]
    again = torch.tensor([[0, 0, 1, 0]])  # what comes later is another document
    assert document_mask(again)[0, 3].tolist() == [False, False, False, True]
    assert document_positions(again).tolist() == [[0, 1, 0, 0]]
    counts = torch.ones_like(IDS, dtype=torch.bool)
    assert torch.equal(positions_within(IDS, counts), document_positions(IDS))


@pytest.mark.parametrize("num_kv_heads", [6, 2])
def test_attention_by_documents_equals_attention_with_the_dense_mask(num_kv_heads):
    results = []
    for mask in (document_mask(IDS), dense()):
        q, k, v = heads(num_kv_heads)
        attended = grouped_attention(q, k, v, mask)
        attended.square().sum().backward()
        results.append([attended, q.grad, k.grad, v.grad])
    torch.testing.assert_close(*results)


class AttentionLengths(TorchDispatchMode):
    """The lengths of the sequences that attention kernels run on."""

    def __init__(self):
        super().__init__()
        self.lengths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.lengths.append(args[0].shape[2])
        return func(*args, **kwargs or {})


def test_attention_by_documents_computes_nothing_between_documents():
    """Also in the form in which torchtune calls it."""
    q, k, v = heads(6)
    call = {"dropout_p": 0.0, "is_causal": False}
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense()[:, None, :, :], **call)
    with AttentionLengths() as kernels:
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=document_mask(IDS)[:, None, :, :], **call
        )
    torch.testing.assert_close(attended, expected)
    assert kernels.lengths == [5, 3, 1, 2, 11, 2, 9]


def test_what_is_made_of_a_mask_is_a_plain_tensor():
    mask = document_mask(IDS)
    for made in (mask & mask, mask[:, -3:], mask[..., :4], mask.clone(), mask.float(), mask[:1]):
        assert type(made) is Tensor
    q, k, v = heads()
    last = grouped_attention(q[:, :, -3:], k, v, mask[:, -3:])  # the last tokens of each row
    torch.testing.assert_close(last, grouped_attention(q, k, v, mask)[:, :, -3:])


def test_compiled_attention_uses_the_dense_mask_and_is_not_compiled_again():
    compiled = torch.compile(grouped_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    q, k, v = heads()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (IDS, IDS.flip(0)):
            expected = grouped_attention(q, k, v, document_mask(ids))
            torch.testing.assert_close(compiled(q, k, v, document_mask(ids)), expected)
    traced = torch.compile(document_mask, fullgraph=True, backend="aot_eager")(IDS)
    assert type(traced) is Tensor
    assert torch.equal(traced, dense())
