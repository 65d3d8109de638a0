import math

import pytest
import torch
import torch.nn.functional as F
from support import VOCAB, TinyEncoder, text, tiny_decoder

from torchfuse import fuse
from torchfuse.errors import ModelError
from torchfuse.training.loss import next_token_loss


def test_labels_are_shifted_once():
    logits, labels = torch.randn(2, 7, 11), torch.randint(0, 11, (2, 7))
    labels[0, :3] = -100
    total, count = next_token_loss(logits, labels)
    expected = [
        -logits[b, t].log_softmax(-1)[labels[b, t + 1]]
        for b in range(2)
        for t in range(6)
        if labels[b, t + 1] != -100
    ]
    torch.testing.assert_close(total, torch.stack(expected).sum())
    assert int(count) == len(expected) == 10


def test_labels_have_weights():
    logits, labels = torch.randn(2, 7, 11, requires_grad=True), torch.randint(0, 11, (2, 7))
    labels[0, :3] = -100
    weights = torch.rand(2, 7)
    weights[1, 2:5] = 0
    total, count = next_token_loss(logits, labels, loss_weights=weights)
    counted = [(b, t) for b in range(2) for t in range(6) if labels[b, t + 1] != -100]
    each = [-logits[b, t].log_softmax(-1)[labels[b, t + 1]] * weights[b, t + 1] for b, t in counted]
    torch.testing.assert_close(total, torch.stack(each).sum())
    torch.testing.assert_close(count, torch.stack([weights[b, t + 1] for b, t in counted]).sum())
    total.backward()
    assert not logits.grad[1, 1:4].any()
    ones, number = next_token_loss(logits, labels, loss_weights=torch.ones(2, 7))
    torch.testing.assert_close(ones, next_token_loss(logits, labels)[0])
    assert number == next_token_loss(logits, labels)[1]
    with pytest.raises(
        ModelError, match=r"loss_weights must be \[2, 7\] as the tokens are, got \[2, 6\]"
    ):
        next_token_loss(logits, labels, loss_weights=weights[:, 1:])


def test_logits_that_predict_a_token_do_not_depend_on_it():
    model, tokens = tiny_decoder(), text()
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB
    with torch.no_grad():
        logits, changed_logits = model(tokens), model(changed)
    assert torch.equal(logits[:, :6], changed_logits[:, :6])
    assert not torch.allclose(logits[:, 6], changed_logits[:, 6])


def test_the_loss_of_random_tokens_stays_at_chance():
    decoder = tiny_decoder()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(120):
        tokens = torch.randint(0, VOCAB, (16, 13), generator=generator)
        total, count = next_token_loss(decoder(tokens), tokens)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
    assert sum(losses[-20:]) / 20 > math.log(VOCAB) - 0.02


def test_micro_batches_are_weighted_by_their_tokens():
    """Two micro-batches with different numbers of labels give the gradient of one batch."""

    def gradient(parts):
        model = fuse(tiny_decoder(), TinyEncoder(), every=1, decoder_trainable=True)
        labels = text()
        labels[0, :11] = -100
        total_count = sum(int((labels[p][:, 1:] != -100).sum()) for p in parts)
        for part in parts:
            total, _ = next_token_loss(model(text()[part]), labels[part])
            (total / total_count).backward()
        return model.output.weight.grad

    whole = gradient([slice(0, 2)])
    torch.testing.assert_close(gradient([slice(0, 1), slice(1, 2)]), whole, rtol=1e-4, atol=1e-7)
    assert whole.any()


def test_a_batch_without_labels_has_zero_loss_and_gradient():
    model = fuse(tiny_decoder(), TinyEncoder(), every=1, decoder_trainable=True)
    total, count = next_token_loss(model(text()), torch.full((2, 13), -100))
    total.backward()
    assert float(total.detach()) == int(count) == 0
    assert not model.output.weight.grad.any()


def test_the_loss_of_low_precision_logits_is_computed_in_fp32():
    logits, labels = torch.randn(1, 5, 11).bfloat16(), torch.randint(0, 11, (1, 5))
    total, _ = next_token_loss(logits, labels)
    assert total.dtype == torch.float32
    expected = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(total, expected)
