"""Head and loss on supervised positions alone, against the logits of all positions."""

from __future__ import annotations

import pytest
import torch
from models.architectures import every_arch, make, prompt
from ranks import run_on_ranks
from support import VOCAB, inputs, text, tiny_decoder
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.training import set_activation_checkpointing

from torchfuse import quantize
from torchfuse.errors import ModelError
from torchfuse.training import linear_loss, linear_next_token_loss, next_token_loss, shard


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear_loss, "_rows_of_a_chunk", lambda *_: 3)


def labels_of(tokens, learned=0.4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(tokens.shape, generator=generator) < learned
    return torch.where(kept & (tokens < VOCAB), tokens, -100)


def weights_of(labels):
    generator = torch.Generator().manual_seed(4)
    return torch.rand(labels.shape, generator=generator) * (
        torch.rand(labels.shape, generator=generator) < 0.8
    )


def compare(model, tokens, labels, *, tolerance=1e-6, call=None, **options):
    """Sum, count and gradients of both losses."""
    call = call or {}
    results = []
    for linear in (True, False):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(11)
        if linear:
            total, count = linear_next_token_loss(model, tokens, labels=labels, **call, **options)
        else:
            total, count = next_token_loss(model(tokens, **call), labels, **options)
        (0.7 * total / count.clamp(min=0.1)).backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((total.detach(), count, grads))
    (total, count, grads), (expected, number, expected_grads) = results
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(count, number)
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance * largest + 1e-12)
    return grads


@pytest.mark.parametrize(
    "options",
    [{}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"z_loss": 0.03, "label_smoothing": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_added_to_the_loss(options, weighted):
    model, tokens = make("cross_attention", decoder_trainable=True), text(2, 13)
    labels = labels_of(tokens)
    if weighted:
        options = {**options, "loss_weights": weights_of(labels)}
    compare(model, tokens, labels, call={"encoder_input": inputs(2)}, **options)


@every_arch
def test_every_architecture(name):
    model, tokens = make(name), prompt(name)
    grads = compare(model, tokens, labels_of(tokens), call={"encoder_input": inputs(2)})
    assert any("adapter" in key or "fusion" in key for key in grads)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("new", "scored"), [(0, False), (2, False), (2, True)])
def test_heads(new, scored, tied, trained):
    """Plain and tied heads, with and without rows of new tokens, frozen and trained."""
    model = make(
        "cross_attention",
        decoder=tiny_decoder(tied=tied),
        fusion_vocab_size=new,
        fusion_head=scored,
        decoder_trainable=trained,
    )
    tokens = text(2, 13)
    labels = labels_of(tokens)
    if scored:
        tokens[:, 4] = labels[:, 4] = VOCAB + new - 1
    compare(model, tokens, labels, call={"encoder_input": inputs(2)})


@pytest.mark.parametrize(
    "build",
    [
        tiny_decoder,
        lambda: llama3_2(**_SIZES),
        lambda: gemma2(**_SIZES, head_dim=4, intermediate_dim=29),
    ],
    ids=["torchfuse", "llama3_2", "gemma2"],
)
def test_a_decoder_that_is_not_fused(build):
    tokens = text(2, 13)
    compare(build(), tokens, labels_of(tokens))


_SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "embed_dim": 18,
    "max_seq_len": 53,
}


@pytest.mark.parametrize("learned", [0.0, 1.0])
def test_no_label_and_all_labels(learned):
    model, tokens = make("cross_attention"), text(2, 13)
    grads = compare(model, tokens, labels_of(tokens, learned), call={"encoder_input": inputs(2)})
    assert all(grad.isfinite().all() for grad in grads.values())
    assert learned or not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("learned", [0.0, 1.0])
@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic"])
def test_quantized_heads(scheme, learned):
    model, tokens = make("cross_attention").requires_grad_(False), text(2, 13)
    quantize(model, scheme)
    labels, call = labels_of(tokens, learned), {"encoder_input": inputs(2)}
    total, _ = linear_next_token_loss(model, tokens, labels=labels, **call)
    expected, _ = next_token_loss(model(tokens, **call), labels)
    torch.testing.assert_close(total, expected)


def test_logits_are_never_whole(monkeypatch):
    model, tokens = make("cross_attention"), text(2, 13)
    rows = []
    model.decoder.output.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    labels = labels_of(tokens, 0.9)
    _, count = linear_next_token_loss(model, tokens, labels=labels, encoder_input=inputs(2))
    assert max(rows) == 3
    assert sum(rows) == int(count)
    assert model(tokens, encoder_input=inputs(2)).shape == (2, 13, VOCAB)  # the head is back


def test_a_model_that_fails_has_its_head_afterwards():
    model, tokens = make("cross_attention"), text(2, 13)
    with pytest.raises(Exception, match="encoder_nonsense"):
        linear_next_token_loss(model, tokens, labels=tokens, encoder_nonsense=1)
    assert model(tokens, encoder_input=inputs(2)).shape == (2, 13, VOCAB)


def test_chunks_of_torchtune_recipes_stay_as_they_are_set():
    model, tokens = make("prefix"), text(2, 13)
    model.set_num_output_chunks(3)
    total, _ = linear_next_token_loss(model, tokens, labels=tokens, encoder_input=inputs(2))
    chunks = model(tokens, encoder_input=inputs(2))
    assert len(chunks) == 3
    torch.testing.assert_close(total, next_token_loss(torch.cat(chunks, dim=1), tokens)[0])


def test_hidden_states_may_be_asked_for():
    model, tokens = make("cross_attention"), text(2, 13)
    expected, _ = linear_next_token_loss(model, tokens, labels=tokens, encoder_input=inputs(2))
    model.output_hidden_states = [1]
    total, _ = linear_next_token_loss(model, tokens, labels=tokens, encoder_input=inputs(2))
    assert torch.equal(total, expected)


def test_without_gradients_nothing_is_computed_for_them():
    model, tokens = make("cross_attention"), text(2, 13)
    call = {"encoder_input": inputs(2)}
    with torch.no_grad():
        total, _ = linear_next_token_loss(model, tokens, labels=tokens, **call)
        expected, _ = next_token_loss(model(tokens, **call), tokens)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    """Models in bf16, and under autocast: fp32 sums of what the head computes in bf16."""
    model, tokens = make("cross_attention", decoder_trainable=True), text(2, 13)
    model.to(dtype)
    call = {"encoder_input": {"x": inputs(2)["x"].to(dtype)}}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
        compare(model, tokens, labels_of(tokens), call=call, tolerance=2e-2)


def test_checkpointed_activations():
    model, tokens = make("mot"), text(2, 13)
    set_activation_checkpointing(model, {type(layer) for layer in model.layers})
    compare(model, tokens, labels_of(tokens), call={"encoder_input": inputs(2)})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole):
    model, tokens = make("cross_attention"), text(2, 13)
    labels, call = labels_of(tokens), {"encoder_input": inputs(2)}
    expected, _ = linear_next_token_loss(model, tokens, labels=labels, **call)
    if whole:
        model = torch.compile(model, backend="aot_eager")
    else:
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    for _ in range(2):
        total, _ = linear_next_token_loss(model, tokens, labels=labels, **call)
    torch.testing.assert_close(total, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_the_loss():
    model, tokens, images = make("cross_attention"), text(2, 13), inputs(2)

    def loss(tokens):
        return linear_next_token_loss(model, tokens, labels=tokens, encoder_input=images)[0]

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(tokens), loss(tokens))
    assert model(tokens, encoder_input=inputs(2)).shape == (2, 13, VOCAB)


def test_operations_are_counted():
    model, tokens = make("cross_attention"), text(2, 13)
    labels = labels_of(tokens, 0.2)
    counts = []
    for some in (labels, tokens):
        with FlopCounterMode(display=False) as counter:
            linear_next_token_loss(model, tokens, labels=some, encoder_input=inputs(2))[0].backward()
        counts.append(counter.get_total_flops())
    head = 4 * model.decoder.output.in_features * VOCAB  # of a position, forward and backward
    assert counts[1] - counts[0] == head * (2 * 12 - int((labels[:, 1:] != -100).sum()))


def test_auxiliary_losses_are_scaled_with_it():
    model, tokens = make("moma", noise=False, auxiliary_loss_weight=0.3).train(), text(2, 13)
    compare(model, tokens, labels_of(tokens), call={"encoder_input": inputs(2)})


@pytest.mark.parametrize("wrong", ["labels", "loss_weights"])
def test_labels_and_weights_of_another_shape(wrong):
    given = {"labels": text(2, 13), wrong: text(2, 12)}
    with pytest.raises(ModelError, match=rf"{wrong} must be \[2, 13\] as the tokens are, got \[2, 12\]"):
        linear_next_token_loss(make("prefix"), text(2, 13), **given)


class Head(nn.Module):
    """A decoder without anything but a head: the hidden states are a parameter."""

    def __init__(self, rows):
        super().__init__()
        torch.manual_seed(31)
        self.hidden = nn.Parameter(torch.randn(1, rows, 61))
        self.output = nn.Linear(61, VOCAB, bias=False)
        self.num_output_chunks = 0

    def chunked_output(self, hidden):
        return [self.output(hidden)]

    def forward(self, tokens):
        return self.chunked_output(self.hidden) if self.num_output_chunks else self.output(self.hidden)


def test_gradients_in_bf16_have_the_length_of_those_in_float64():
    """A factor that bf16 rounds, such as one divided by 1,429 tokens, would lengthen or shorten all."""
    model, labels = Head(1431).bfloat16(), text(1, 1431)
    total, count = linear_next_token_loss(model, labels, labels=labels)
    (total / (count - 1)).backward()
    hidden, weight = (p.detach().double().requires_grad_() for p in model.parameters())
    scores = torch.einsum("bsd,vd->bsv", hidden, weight)[0, :-1]
    expected = (scores.logsumexp(-1) - scores.gather(-1, labels[0, 1:, None])[:, 0]).sum()
    (expected / (count - 1)).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    for given, exact in ((model.hidden, hidden), (model.output.weight, weight)):
        got = given.grad.double()
        assert float((got * exact.grad).sum() / exact.grad.square().sum()) == pytest.approx(1, abs=8e-4)
        assert (got - exact.grad).norm() < 4e-3 * exact.grad.norm()


def test_gradients_of_gradients_are_refused():
    model = Head(7)
    total, _ = linear_next_token_loss(model, text(1, 7), labels=text(1, 7))
    with pytest.raises(ModelError, match=r"not gradients of gradients: use next_token_loss\(model"):
        torch.autograd.grad(total, [model.hidden], create_graph=True)


class Whole(nn.Module):
    """A model whose head cannot be told apart."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Embedding(VOCAB, 7), nn.Linear(7, VOCAB))

    def forward(self, tokens):
        return self.decoder(tokens)


def test_a_model_without_a_head_of_its_own():
    tokens = text(2, 13)
    compare(Whole(), tokens, labels_of(tokens))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_ranks(reshard, tied):
    run_on_ranks(_on_ranks, reshard, tied)


def _on_ranks(rank, reshard, tied):
    linear_loss._rows_of_a_chunk = lambda *_: 3
    models = [
        make(
            "cross_attention",
            decoder=tiny_decoder(tied=tied),
            decoder_trainable=True,
            on_missing="participate",
            example_input=inputs(1),
        )
        for _ in range(2)
    ]
    tokens = text(4, 13)
    labels = labels_of(tokens)
    labels[2] = -100
    alone, sharded = models
    linear_next_token_loss(alone, tokens, labels=labels, encoder_input=inputs(4))[0].backward()
    shard(sharded, **({"reshard_after_forward": True} if reshard else {}))  # of the root too
    own = slice(2 * rank, 2 * rank + 2)
    total, _ = linear_next_token_loss(
        sharded, tokens[own], labels=labels[own], encoder_input={"x": inputs(4)["x"][own]}
    )
    (2 * total).backward()  # gradients are averaged
    for (name, p), q in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-5, msg=name)
