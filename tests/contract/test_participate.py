"""One rank has an image, the other has none: the step ends, and text costs nothing it did not cost."""

import pytest
import torch
from ranks import run_on_ranks
from support import IMAGE, TinyEncoder, inputs, open_gates, text, text_with_image, tiny_decoder
from torch import distributed

from torchfuse import fuse, param_groups
from torchfuse.training.loss import next_token_loss
from torchfuse.training.sharding import shard

ARCHS = {
    "cross_attention": {"every": 1},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}


def make(name, **options):
    model = fuse(tiny_decoder(), TinyEncoder(), encoder_trainable=True, **ARCHS[name], **options)
    return open_gates(model) if name == "cross_attention" else model


@pytest.mark.parametrize("name", ARCHS)
def test_a_stand_in_changes_no_bit_and_reaches_every_new_weight(name):
    plain, model = make(name), make(name, on_missing="participate")
    assert torch.equal(model(text()), plain(text()))
    loss, _ = next_token_loss(model(text()), text())
    loss.backward()
    for parameter_name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, parameter_name
            assert not p.grad.any(), parameter_name


@pytest.mark.parametrize("name", ARCHS)
def test_named_encoders_take_part_one_by_one(name):
    def both(on_missing):
        encoders = {"a": TinyEncoder(), "b": TinyEncoder(seed=4)}
        options = dict(ARCHS[name])
        if "encoder_token" in options:
            options["encoder_token"] = {"a": IMAGE, "b": IMAGE + 1}
        model = fuse(tiny_decoder(), encoders, encoder_trainable=True, on_missing=on_missing, **options)
        return open_gates(model) if name == "cross_attention" else model

    tokens = text_with_image() if name == "placeholder" else text()
    plain, model = both("skip"), both("participate")
    only_a = {"encoder_input": {"a": inputs()}}
    torch.testing.assert_close(model(tokens, **only_a), plain(tokens, **only_a), rtol=1e-5, atol=1e-6)
    model(tokens, **only_a).square().sum().backward()
    assert not model.adapters["b"].linear_1.weight.grad.any()
    assert model.adapters["a"].linear_1.weight.grad.any()


def test_an_encoder_without_an_example_is_named():
    encoder = torch.nn.Linear(5, 11)
    with pytest.raises(ValueError, match=r"pass example_input=, or give Linear a method example_input"):
        fuse(tiny_decoder(), encoder, every=1, encoder_dim=11, on_missing="participate")
    model = fuse(
        tiny_decoder(),
        encoder,
        every=1,
        encoder_dim=11,
        on_missing="participate",
        example_input={"input": torch.zeros(1, 1, 5)},
    )
    assert torch.equal(model(text()), tiny_decoder()(text()))


def test_calls_with_caches_do_not_take_part():
    model = make("cross_attention", on_missing="participate").eval()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=13)
    causal = torch.ones(1, 13, 13, dtype=torch.bool).tril().expand(2, -1, -1)
    model(text(), mask=causal, input_pos=torch.arange(13))
    assert calls == []


def step(rank, name):
    with_image = rank == 0
    tokens = text_with_image() if with_image and name == "placeholder" else text()
    given = {"encoder_input": inputs()} if with_image else {}
    alone = make(name)
    expected, _ = next_token_loss(alone(tokens, **given), text())

    model = make(name, on_missing="participate")
    shard(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    for turn in range(2):
        loss, _ = next_token_loss(model(tokens, **given), text())
        if turn == 0 and not with_image:
            assert torch.equal(loss, expected), (loss, expected)
        loss.backward()
        # The other rank's image is in this rank's gradients, averaged.
        assert any(p.grad.full_tensor().any() for p in model.encoder.parameters())
        optimizer.step()
        optimizer.zero_grad()
    distributed.barrier()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ARCHS)
def test_defect_4_two_ranks_one_image(name):
    run_on_ranks(step, name)


def seeded_apart(rank):
    torch.manual_seed(rank)
    model = fuse(tiny_decoder(), TinyEncoder(seed=1), every=1, on_missing="participate")
    torch.manual_seed(rank)
    model.adapter.linear_1.reset_parameters()
    shard(model)
    torch.manual_seed(0)
    expected = torch.nn.Linear(11, 18)
    assert torch.equal(model.adapter.linear_1.weight.full_tensor(), expected.weight)


@pytest.mark.distributed
def test_fresh_weights_are_rank_zeros_everywhere():
    run_on_ranks(seeded_apart)


def refuse(rank):
    with pytest.raises(ValueError, match='needs on_missing="participate"'):
        shard(make("cross_attention"))
    with pytest.raises(ValueError, match="no layer to shard"):
        shard(torch.nn.Linear(3, 3))


@pytest.mark.distributed
def test_sharding_refuses_what_would_wait_for_ever():
    run_on_ranks(refuse, world_size=1)
