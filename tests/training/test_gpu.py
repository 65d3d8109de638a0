"""Training on a GPU, by test bodies that run on the CPU too where there is something to compare."""

import pytest
import torch
from models.architectures import every_arch, make, prompt
from support import VOCAB, TinyEncoder, inputs, tiny_decoder

from torchfuse import add_lora, fuse, quantize
from torchfuse.naming import named_parameters
from torchfuse.params import FreezeSchedule
from torchfuse.training import (
    StepSettings,
    computing_in,
    estimate,
    keep_in_fp32,
    linear_next_token_loss,
    next_token_loss,
    offload_activations,
    step_in_backward,
)
from torchfuse.training.parallel import checkpoint_activations, compile_layers

on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
devices = pytest.mark.parametrize("device", ["cpu", on_gpu])


def batch(name, device, seed=2):
    tokens = prompt(name)
    labels = tokens.masked_fill(tokens >= VOCAB, -100)
    x = {"x": inputs(len(tokens), seed=seed)["x"].to(device)}
    return {"tokens": tokens.to(device), "labels": labels.to(device), "encoder_input": x}


def gradients(model):
    return {key: p.grad.clone() for key, p in named_parameters(model) if p.grad is not None}


def step(model, call):
    """The loss and the gradients of a batch."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    total, count = linear_next_token_loss(model, **call)
    (total / count).backward()
    return (total / count).detach(), gradients(model)


@devices
@every_arch
def test_the_linear_loss_is_that_of_all_logits(name, device):
    model, call = make(name).to(device), batch(name, device)
    loss, found = step(model, call)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    total, count = next_token_loss(
        model(call["tokens"], encoder_input=call["encoder_input"]), call["labels"]
    )
    (total / count).backward()
    torch.testing.assert_close(loss, (total / count).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@devices
@every_arch
def test_layers_that_are_checkpointed_and_compiled_have_the_same_gradients(name, device):
    model, call = make(name).to(device), batch(name, device)
    loss, expected = step(model, call)
    assert checkpoint_activations(model, list(expected))
    compile_layers(model, backend="aot_eager" if device == "cpu" else "inductor")
    again, found = step(model, call)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@devices
@every_arch
def test_fp32_weights_under_bf16_train_as_fp32_does(name, device):
    """The loss after ten steps, and no weight that trains is in bf16."""
    losses = {}
    for kind in ("fp32", "bf16"):
        model = make(name, encoder_trainable=False).to(device)
        dtype = torch.float32
        if kind == "bf16":
            dtype = torch.bfloat16
            model.to(dtype)
            keep_in_fp32(model, FreezeSchedule(()).trained_ever(model))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for seed in range(10):
            with computing_in(dtype, torch.device(device)):
                losses[kind], _ = step(model, batch(name, device, seed))
            optimizer.step()
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.02, atol=0)


@pytest.mark.gpu
@every_arch
def test_the_loss_on_a_gpu_is_that_of_the_cpu(name):
    model = make(name)
    loss, expected = step(model, batch(name, "cpu"))
    found_loss, found = step(model.cuda(), batch(name, "cuda"))
    torch.testing.assert_close(found_loss.cpu(), loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close({k: v.cpu() for k, v in found.items()}, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
def test_offloaded_activations_have_the_same_gradients_in_less_memory():
    model = fuse(wide_decoder(), TinyEncoder(), arch="cross_attention", every=1).cuda()
    call = wide_batch()
    before, expected = step(model, call)
    peak = memory_of(model, call)
    offload_activations(model)
    after, found = step(model, call)
    assert torch.equal(after, before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert memory_of(model, call) < 0.9 * peak


@pytest.mark.gpu
def test_an_optimizer_in_the_backward_pass_holds_no_gradients():
    model = fuse(wide_decoder(), TinyEncoder(), every=1, decoder_trainable=True).cuda()
    call = wide_batch()
    sizes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    peak = memory_of(model, call)
    trained = [p for p in model.parameters() if p.requires_grad]
    step_in_backward(trained, torch.optim.SGD(trained, lr=1e-3))
    assert memory_of(model, call) < peak - sizes / 2


@devices
def test_lora_over_a_four_bit_base(device):
    decoder = tiny_decoder(embed_dim=128, num_heads=4, num_kv_heads=2, intermediate_dim=256)
    model = make("cross_attention", decoder=decoder, decoder_trainable=False).to(device)
    quantize(model, "nf4", parts=("decoder",))
    add_lora(model, rank=2, alpha=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss, found = step(model, batch("cross_attention", device))
        assert any("lora_a" in key for key in found)
        assert all(torch.isfinite(grad).all() for grad in found.values())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


@devices
def test_optimizers_of_torchao(device):
    from torchao.optim import AdamW8bit

    losses = {}
    for kind in (torch.optim.AdamW, AdamW8bit):
        model = make("cross_attention").to(device)
        optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for seed in range(10):
            losses[kind], _ = step(model, batch("cross_attention", device, seed))
            optimizer.step()
    torch.testing.assert_close(losses[AdamW8bit], losses[torch.optim.AdamW], rtol=0.02, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_the_estimate_is_the_memory_of_a_step(trained):
    """A bf16 model with fp32 weights where it trains; allocated blocks, without the optimizer."""
    model = fuse(wide_decoder(), TinyEncoder(), every=1, decoder_trainable=trained).cuda()
    model.to(torch.bfloat16)
    keep_in_fp32(model, FreezeSchedule(()).trained_ever(model))
    call = wide_batch()
    call["encoder_input"] = {"x": call["encoder_input"]["x"].bfloat16()}
    rows, length = call["tokens"].shape
    settings = StepSettings(batch_size=rows, seq_len=length, images=1, supervised=1.0)
    expected = estimate(model, settings)
    with computing_in(torch.bfloat16, torch.device("cuda")):
        peak = memory_of(model, call) + sum(p.nbytes for p in model.parameters())
    phases = [sum(sizes.values()) for name, sizes in expected.phases.items() if name != "optimizer"]
    assert abs(max(phases) - peak) < 0.15 * peak


def wide_decoder():
    sizes = {"vocab_size": 8192, "num_layers": 4, "embed_dim": 512, "num_heads": 8, "num_kv_heads": 4}
    return tiny_decoder(**sizes, max_seq_len=1024, intermediate_dim=1536)


def wide_batch():
    tokens = torch.randint(1, 8192, (4, 1024), generator=torch.Generator().manual_seed(1)).cuda()
    x = {"x": inputs(4)["x"].cuda()}
    return {"tokens": tokens, "labels": tokens, "encoder_input": x}


def memory_of(model, call):
    """The peak of a step over what is allocated before, in bytes."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    total, count = linear_next_token_loss(model, **call)
    (total / count).backward()
    peak = torch.cuda.max_memory_allocated() - before
    model.zero_grad(set_to_none=True)
    return peak
