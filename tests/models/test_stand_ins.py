"""Batches and ranks without images: stand-ins run every parameter and change nothing."""

import pytest
import torch
from models.architectures import ARCHS, every_arch, in_place, labels_of, make, prompt, two_encoders
from ranks import run_on_ranks
from support import IMAGE, TinyEncoder, inputs, text, tiny_decoder
from torch.distributed.fsdp import fully_shard

from torchfuse import fuse, get_fusion_params, param_groups
from torchfuse.training import shard
from torchfuse.training.loss import next_token_loss


def scored(model, *args, **kwargs):
    torch.manual_seed(29)  # experts are chosen with noise
    return model(*args, **kwargs)


@every_arch
def test_a_stand_in_changes_no_bit_and_reaches_every_new_weight(name):
    plain, model = make(name), make(name, on_missing="participate")
    out = scored(model, text())
    assert torch.equal(out, scored(plain, text()))
    out.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any() == (".text." in parameter_name), parameter_name


@every_arch
def test_named_encoders_participate_one_by_one(name):
    def both(on_missing):
        encoders = two_encoders()
        token = {"encoder_token": {"eye": IMAGE, "ear": IMAGE + 1}} if in_place(name) else {}
        return make(name, encoder=encoders, on_missing=on_missing, **token)

    only, plain, model = {"encoder_input": {"eye": inputs()}}, both("skip"), both("participate")
    out = scored(model, prompt(name), **only)
    torch.testing.assert_close(out, scored(plain, prompt(name), **only), rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    for parameter_name, parameter in get_fusion_params(model).items():
        assert parameter.grad.any() == ("ear" not in parameter_name.split(".")), parameter_name


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


def test_calls_with_caches_skip_encoders():
    model = make("cross_attention", on_missing="participate").eval()
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    model.setup_caches(2, torch.float32, encoder_max_seq_len=7, decoder_max_seq_len=13)
    causal = torch.ones(1, 13, 13, dtype=torch.bool).tril().expand(2, -1, -1)
    model(text(), mask=causal, input_pos=torch.arange(13))
    assert calls == []


def quiet(name):
    return {"noise": False} if ARCHS[name].get("arch") == "moma" else {}


def of_rank(model, name, rank):
    """Loss per token and gradients of a rank's batch: rank zero has an image, the other none."""
    images = rank == 0
    tokens, given = (prompt(name), {"encoder_input": inputs()}) if images else (text(), {})
    loss, count = next_token_loss(model(tokens, **given), labels_of(tokens if images else text(seed=5)))
    (loss / count).backward()
    return loss / count, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(rank, name):
    options = {"decoder_trainable": True, "on_missing": "participate", **quiet(name)}
    alone = [of_rank(make(name, **options), name, r) for r in (0, 1)]
    model = make(name, **options)
    shard(model)
    loss, gradients = of_rank(model, name, rank)
    torch.testing.assert_close(loss, alone[rank][0], rtol=1e-6, atol=1e-6)
    assert gradients.keys() == alone[0][1].keys() == {n for n, _ in model.named_parameters()}
    for parameter, gradient in gradients.items():
        mean = (alone[0][1][parameter] + alone[1][1][parameter]) / 2
        assert mean.any() or "experts" in parameter, parameter  # one may have taken nothing that counts
        torch.testing.assert_close(gradient.full_tensor(), mean, rtol=1e-6, atol=1e-6, msg=parameter)
    torch.optim.AdamW(param_groups(model, lr=1e-3)).step()
    of_rank(model, name, rank)  # the next step runs, too


def fresh_weights_are_those_of_rank_zero(rank):
    torch.manual_seed(rank)
    model = fuse(tiny_decoder(), TinyEncoder(seed=1), every=1, on_missing="participate")
    torch.manual_seed(rank)
    model.adapter.linear_1.reset_parameters()
    shard(model)
    torch.manual_seed(0)
    expected = torch.nn.Linear(11, 18)
    assert torch.equal(model.adapter.linear_1.weight.full_tensor(), expected.weight)


def compare_all(rank):
    for name in ARCHS:
        try:
            compare(rank, name)
        except BaseException as error:
            raise AssertionError(f"{name}, rank {rank}: {error}") from error
    fresh_weights_are_those_of_rank_zero(rank)


@pytest.mark.distributed
def test_two_ranks_one_without_an_image_equal_one_process():
    run_on_ranks(compare_all)


def refuse(rank):
    with pytest.raises(ValueError, match='need a model with on_missing="participate"'):
        shard(make("cross_attention"))
    with pytest.raises(ValueError, match="no layer to shard"):
        shard(torch.nn.Linear(3, 3))
    from torchtune.training import get_shard_conditions, shard_model

    for name in ("mot", "mot_placeholder", "moma"):
        options = {"on_missing": "participate", "decoder_trainable": True}
        whole, inner = make(name, **options), make(name, **options)
        # All that is called a layer, so both a fused one and what it wraps.
        shard_model(whole, [get_shard_conditions], cpu_offload=False)
        fully_shard(inner.layers[0].wrapped)
        for model in (whole, inner):
            for call in ({"encoder_input": inputs()}, {}):
                tokens = prompt(name) if call else text()
                with pytest.raises(
                    ValueError, match="inside this .* is sharded .*torchfuse.training.shard"
                ):
                    model(tokens, **call)
        sharded = make(name, **options)
        shard(sharded)
        expected = scored(make(name, **options), prompt(name), encoder_input=inputs())
        out = scored(sharded, prompt(name), encoder_input=inputs())
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.distributed
def test_sharding_that_would_block_a_rank_or_compute_on_shards_is_refused():
    run_on_ranks(refuse, world_size=1)
