"""Training of every architecture: what can be learned, gradients, graphs and activation checkpointing."""

import math

import pytest
import torch
from models.architectures import (
    ARCHS,
    ROUTED,
    every_arch,
    fresh,
    in_place,
    labels_of,
    make,
    prompt,
)
from support import BACKENDS, FEATURES, LAYERS, VOCAB, inputs, text, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune.modules import TransformerCrossAttentionLayer, TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from torchfuse import get_fusion_params, param_groups
from torchfuse.naming import canonical_name, unwrap
from torchfuse.training.loss import next_token_loss

# --- what can be learned -------------------------------------------------------------------------


def losses_of(name, target, steps=200):
    """Loss per token of each step on ids that are drawn anew each time, everything training."""
    model = fresh(name, decoder_trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator, losses = torch.Generator().manual_seed(31), []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (5, 8 + FEATURES * in_place(name)), generator=generator)
        if in_place(name):
            ids[:, 3 : 3 + FEATURES] = prompt(name)[0, 2]
        loss, count = next_token_loss(model(ids, encoder_input=inputs(5)), target(ids))
        losses.append(loss.detach() / count)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    return torch.stack(losses)


# That logits are aligned with tokens is tested for each architecture in test_architectures.
@pytest.mark.parametrize("name", ["cross_attention", "prefix", "mot_placeholder"])
def test_random_ids_cannot_be_predicted(name):
    losses = losses_of(name, labels_of)
    assert losses.unfold(0, 40, 20).mean(dim=1).min() > math.log(VOCAB) - 0.02


def test_labels_that_are_shifted_the_wrong_way_can_be_copied():
    """As the test above, with labels that are not the next ids: the loss shows it."""
    assert losses_of("prefix", lambda ids: ids.roll(1, dims=1))[-20:].mean() < math.log(VOCAB) - 1


CLASSES = 4


def questions(generator):
    """Random text and one of four images; the last id is determined by the image alone."""
    shown = torch.randint(0, CLASSES, (16,), generator=generator)
    tokens = torch.randint(CLASSES, VOCAB, (16, 7), generator=generator)
    tokens[:, -1] = shown
    return tokens, tokens.masked_fill(torch.arange(7) < 6, -100), inputs(CLASSES)["x"], shown


@pytest.mark.parametrize("name", ["cross_attention", "prefix", *ROUTED])
def test_answers_that_only_the_image_determines_are_learned(name):
    torch.manual_seed(19)
    model = fresh(name, decoder_trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(29)
    losses = []
    for _ in range(80):
        tokens, labels, pictures, shown = questions(generator)
        total, count = next_token_loss(model(tokens, encoder_input={"x": pictures[shown]}), labels)
        losses.append(float(total.detach() / count))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    chance = math.log(CLASSES)  # the least that text alone allows
    assert losses[0] > chance
    assert sum(losses[-10:]) / 10 < chance / 2
    tokens, labels, pictures, shown = questions(generator)
    with torch.no_grad():
        for given in ({}, {"encoder_input": {"x": pictures[(shown + 1) % CLASSES]}}):
            total, count = next_token_loss(model(tokens, **given), labels)
            assert float(total / count) > chance - 0.1
    gates = [p for name, p in get_fusion_params(model).items() if name.endswith("_scale.scale")]
    assert len(gates) == (2 * LAYERS if name == "cross_attention" else 0)
    assert all(gate != 0 for gate in gates)


# --- gradients -----------------------------------------------------------------------------------


def learning(model, name, batch=2, called=None, seed=29):
    """The loss per token, and the gradients of all that trains."""
    torch.manual_seed(seed)  # experts are chosen with noise
    run = model if called is None else called
    tokens = prompt(name, batch)
    loss, count = next_token_loss(run(tokens, encoder_input=inputs(batch)), labels_of(tokens))
    (loss / count).backward()
    return loss / count, {
        canonical_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in ARCHS), *((n, {"start": "zero"}) for n in ARCHS if n[:2] == "mo")],
    ids=lambda value: value if isinstance(value, str) else "_".join(value.values()),
)
def test_all_that_trains_has_a_gradient_by_the_second_step(name, options):
    model = fresh(name, **options)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for step in range(2):
        optimizer.zero_grad()
        # Enough rows that each expert takes a feature that the loss depends on.
        _, gradients = learning(model, name, batch=11, seed=step)
        optimizer.step()
    assert [n for n, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    assert {n.partition(".")[0] for n in gradients} >= {"encoder", "adapter"}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_arch
def test_a_batch_without_a_target_has_zero_gradients(name):
    model, tokens = make(name, decoder_trainable=True), prompt(name)
    loss, count = next_token_loss(model(tokens, encoder_input=inputs()), torch.full_like(tokens, -100))
    assert loss.item() == count.item() == 0
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert not parameter.grad.any(), parameter_name  # nor is it NaN


def assert_equal(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@every_arch
def test_one_graph_equals_eager_in_values_and_gradients(name, backend):
    torch._dynamo.reset()
    # Two layers, the last of which differs from the first where features are in front of the text.
    model, plain = (
        make(name, decoder=tiny_decoder(num_layers=2), decoder_trainable=True) for _ in range(2)
    )
    called = torch.compile(model, backend=backend, fullgraph=True)
    # Inductor has random numbers of its own; here the experts' noise must be that of the plain model.
    with torch._inductor.config.patch(fallback_random=True):
        compiled = learning(model, name, called=called)
    assert_equal(compiled, learning(plain, name))


@pytest.mark.parametrize("around", ["fused", "pretrained"])
@every_arch
def test_activation_checkpointing_equals_eager_in_values_and_gradients(name, around):
    model, ran = make(name, decoder_trainable=True), []
    # New weights run again, too, if there are any.
    new = [
        m for n, m in model.layers.named_modules() if "fusion_layer" in n and isinstance(m, nn.Linear)
    ]
    (new or [model.layers[1].mlp.w1])[0].register_forward_hook(lambda *_: ran.append(1))
    kinds = {TransformerSelfAttentionLayer, TransformerCrossAttentionLayer}
    if around == "fused":
        kinds = {type(layer) for layer in model.layers}
    set_activation_checkpointing(model, kinds)
    assert_equal(learning(model, name), learning(make(name, decoder_trainable=True), name))
    assert len(ran) == 2  # forward, and again for backward


@every_arch
def test_activation_checkpointing_wraps_every_new_layer(name):
    model = fresh(name)
    new = {id(m) for n, m in model.layers.named_modules() if n.endswith("fusion_layer")}
    fewer = {"prefix": 0, "placeholder": 0, "moma": LAYERS - 1, "deepstack": LAYERS - 1}
    # deepstack leaves the last layer out in both layouts.
    fewer["deepstack_placeholder"] = LAYERS - 1
    assert len(new) == fewer.get(name, LAYERS)
    set_activation_checkpointing(model, {type(layer) for layer in model.layers})
    wrapped = [m for m in model.modules() if isinstance(m, CheckpointWrapper)]
    inside = {id(m) for wrapper in wrapped for m in unwrap(wrapper).modules()}
    assert len(wrapped) >= LAYERS
    assert new <= inside
    model(text() if not in_place(name) else prompt(name), encoder_input=inputs()).mean().backward()
