"""What tests of checkpoint formats compare, and random input for both sides."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    """Equal within a tolerance, and not trivially so."""
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def assert_same_tensors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, with bit-equal values."""
    assert set(got) == set(expected)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def random_tokens(vocab: int, rows: int = 2, length: int = 23, seed: int = 5) -> Tensor:
    return torch.randint(1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_images(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled_rope(context: int) -> dict[str, object]:
    """Llama 3.1's scaling, of a model that was trained on sequences of this length."""
    return {
        "rope_theta": 5e5,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
