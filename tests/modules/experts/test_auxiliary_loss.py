"""Auxiliary losses are scaled as the main loss is: gradients equal those of the plain sum of both."""

import pytest
import torch
import torch.nn.functional as F
from models.architectures import LAYOUTS, move, prompt
from ranks import run_on_ranks
from support import IMAGE, TinyEncoder, inputs, tiny_decoder
from torch import distributed
from torchtune.training import scale_grads, set_activation_checkpointing

from torchfuse import fuse
from torchfuse.errors import ModelError
from torchfuse.modules.experts import expert_choice
from torchfuse.modules.experts.auxiliary_loss import add_loss, mark_main_loss
from torchfuse.modules.experts.modality_experts import MoMaLayer
from torchfuse.naming import named_parameters
from torchfuse.training import shard
from torchfuse.training.loss import next_token_loss
from torchfuse.training.torchtune_loss import CEWithChunkedOutputLoss

WEIGHT = 0.7
COUNTS = (7, 3)  # supervised tokens of two micro-batches


def make():
    model = fuse(
        tiny_decoder(),
        TinyEncoder(),
        arch="moma",
        layers=[1, 2],
        num_experts=2,
        num_text_experts=2,
        noise=False,
        auxiliary_loss_weight=WEIGHT,
        on_missing="participate",
        **LAYOUTS["placeholder"],
    )
    return move(model).train()


def batch(number):
    """Tokens, features, and labels of which ``COUNTS[number]`` count."""
    tokens = prompt("placeholder")
    counts = torch.arange(8).view(2, 4) < COUNTS[number]
    labels = torch.full_like(tokens, -100)
    labels[:, 9:] = tokens[:, 9:].masked_fill(~counts, -100)
    assert not (labels == IMAGE).any()
    return tokens, inputs(seed=number), labels


def mean_loss(logits, labels):
    """Cross-entropy as in a training loop without next_token_loss: of labels shifted by one."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def eager(model):
    return model


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def compiled_by_layer(model):
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def compiled_with_inductor(model):
    return torch.compile(model, fullgraph=True)


def checkpointed(model):
    set_activation_checkpointing(model, {MoMaLayer})
    return model


def checkpointed_and_compiled(model):
    return compiled_by_layer(checkpointed(model))


WAYS = [
    eager,
    compiled,
    compiled_by_layer,
    checkpointed,
    checkpointed_and_compiled,
    pytest.param(compiled_with_inductor, marks=pytest.mark.long),
]


def ways(*chosen):
    return pytest.mark.parametrize("way", chosen, ids=lambda way: way.__name__)


def gradients(model):
    return {name: p.grad.clone() for name, p in named_parameters(model) if p.requires_grad}


def gradients_of_the_plain_sum(monkeypatch, factors):
    """Of ``factor * (main + weight * auxiliary)``, where the auxiliary losses are collected by hand."""
    model, collected = make(), []

    def collect(y, loss, weight, scale):
        assert (weight, scale) == (WEIGHT, 1.0)
        collected.append(weight * loss)
        return y

    monkeypatch.setattr(expert_choice, "add_loss", collect)
    for number, factor in enumerate(factors):
        tokens, given, labels = batch(number)
        main = mean_loss(model(tokens, encoder_input=given), labels)
        assert len(collected) == 2 * 2  # layers and modalities
        (factor * (main + sum(collected))).backward()
        collected.clear()
    monkeypatch.undo()
    return gradients(model)


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    auxiliary = [gradient for name, gradient in expected.items() if "auxiliary" in name]
    assert len(auxiliary) == 2 * 2 * 4
    assert all(gradient.any() for gradient in auxiliary)


# Dynamo looks for gradients of the hidden states that a layer is called with.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@ways(*WAYS)
def test_under_a_grad_scaler(way, monkeypatch):
    torch._dynamo.reset()
    expected = gradients_of_the_plain_sum(monkeypatch, [1.0])
    model = make()
    called, optimizer = way(model), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    tokens, given, labels = batch(0)
    loss = mark_main_loss(mean_loss(called(tokens, encoder_input=given), labels))
    scaler.scale(loss).backward()
    scaled = gradients(model)
    scaler.unscale_(optimizer)
    same(gradients(model), expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(scaled[name], 65536 * gradient)


@ways(eager, compiled_by_layer)
def test_under_torchtunes_scaling_by_tokens(way, monkeypatch):
    torch._dynamo.reset()
    total = sum(COUNTS)
    expected = gradients_of_the_plain_sum(monkeypatch, [count / total for count in COUNTS])
    model = make()
    called, loss_fn = way(model), CEWithChunkedOutputLoss(num_output_chunks=3)
    model.set_num_output_chunks(3)
    for number, count in enumerate(COUNTS):
        tokens, given, labels = batch(number)
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)  # as the recipe does
        (loss_fn(called(tokens, encoder_input=given), shifted) * count).backward()
    scale_grads(model, torch.tensor(1 / total))
    same(gradients(model), expected)


@ways(eager, compiled)
def test_with_accumulation(way, monkeypatch):
    torch._dynamo.reset()
    expected = gradients_of_the_plain_sum(monkeypatch, [1 / 2, 1 / 2])
    model = make()
    called = way(model)
    for number in range(2):
        tokens, given, labels = batch(number)
        loss = mark_main_loss(mean_loss(called(tokens, encoder_input=given), labels))
        loss /= 2  # in place, as loops do
        loss.backward()
    same(gradients(model), expected)


def test_sums_over_tokens_are_marked_as_means(monkeypatch):
    total = sum(COUNTS)
    expected = gradients_of_the_plain_sum(monkeypatch, [count / total for count in COUNTS])
    model = make()
    for number in range(2):
        tokens, given, labels = batch(number)
        (next_token_loss(model(tokens, encoder_input=given), labels)[0] / total).backward()
    same(gradients(model), expected)


def step_of_a_rank(rank, expected):
    model = make()
    shard(model)
    count = torch.tensor(COUNTS[rank])
    distributed.all_reduce(count)
    tokens, given, labels = batch(rank)
    summed, _ = next_token_loss(model(tokens, encoder_input=given), labels)
    (65536 * 2 * summed / count).backward()  # the mean over ranks is a sum over two
    got = {n: p.grad.full_tensor() / 65536 for n, p in named_parameters(model) if p.requires_grad}
    same(got, expected)


def test_two_ranks(monkeypatch):
    total = sum(COUNTS)
    run_on_ranks(
        step_of_a_rank, gradients_of_the_plain_sum(monkeypatch, [count / total for count in COUNTS])
    )


def test_a_loss_that_is_not_marked_is_added_as_it_is(monkeypatch):
    expected = gradients_of_the_plain_sum(monkeypatch, [1.0])
    for marked_before in (False, True):
        model = make()
        tokens, given, labels = batch(0)
        if marked_before:  # of another backward pass, which must leave nothing behind
            (7 * mark_main_loss(torch.ones((), requires_grad=True))).backward()
        mean_loss(model(tokens, encoder_input=given), labels).backward()
        same(gradients(model), expected)


def test_adding_and_marking_leave_values_alone():
    y, w = torch.randn(3, dtype=torch.bfloat16), torch.tensor(3.0, requires_grad=True)
    out = add_loss(y, w.square(), weight=0.25, scale=3.0)
    assert torch.equal(out, y)
    assert out.dtype == y.dtype
    out.float().mul(100).sum().backward()
    assert w.grad.item() == 0.25 * 3 * 6
    loss = torch.tensor(5.0, dtype=torch.float64)
    assert torch.equal(mark_main_loss(loss, 7), loss)
    assert not mark_main_loss(loss).requires_grad
    with pytest.raises(ModelError, match=r"main loss must be a scalar, got \[2\]"):
        mark_main_loss(torch.ones(2))


def test_a_main_loss_over_no_tokens_counts_for_nothing():
    w = torch.tensor(3.0, requires_grad=True)
    y = add_loss(torch.ones(2, requires_grad=True), w.square())
    mark_main_loss(y.sum() * 0, torch.tensor(0)).backward()
    assert w.grad.item() == 0
