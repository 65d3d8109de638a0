"""The encoder without weights, and models with a part that has no parameters."""

import copy
import pickle

import pytest
import torch
from ranks import run_on_ranks
from support import (
    FEATURE_DIM,
    FEATURES,
    IMAGE,
    open_gates,
    same_state,
    state,
    text,
    text_with_image,
    tiny_decoder,
)
from torch import distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from torchfuse import (
    describe,
    fuse,
    generate,
    get_fusion_params,
    load_fusion,
    param_groups,
    quantize,
    save_fusion,
    save_pretrained,
    set_trainable,
)
from torchfuse.encoders.stub import RandomEncoder
from torchfuse.training import shard
from torchfuse.training.loss import next_token_loss

ARCHS = {
    "cross_attention": {"every": 1},
    "placeholder": {"arch": "joint_decoder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder", "placement": "prefix"},
}


def make(name, **options):
    model = fuse(tiny_decoder(), RandomEncoder(FEATURES, FEATURE_DIM, seed=5), **ARCHS[name], **options)
    return open_gates(model) if name == "cross_attention" else model


def images(batch=2, num=1, side=5):
    pixels = torch.randn(batch, num, 3, side, side, generator=torch.Generator().manual_seed(7))
    return pixels.squeeze(1)


def prompt(name):
    return text_with_image() if name == "placeholder" else text()


# --- the encoder itself --------------------------------------------------------------------------


def test_has_no_parameters_and_no_buffers():
    encoder = RandomEncoder(5, 7)
    assert not list(encoder.parameters())
    assert not list(encoder.buffers())
    assert encoder.state_dict() == {}
    assert (encoder.num_tokens, encoder.feature_dim) == (5, 7)


def test_features_are_a_function_of_pixels_and_seed():
    x = images(3)
    features = RandomEncoder(5, 7, seed=3)(x)
    torch.manual_seed(1)
    again = pickle.loads(pickle.dumps(RandomEncoder(5, 7, seed=3)))
    assert torch.equal(again(x), features)
    assert not torch.isclose(RandomEncoder(5, 7, seed=4)(x), features).any(dim=-1).all()
    assert features.std() > 0.3 and features.abs().max() < 1
    # No two tokens, features or images are alike.
    for dim in range(3):
        pairs = zip(features.unbind(dim), features.roll(1, dim).unbind(dim), strict=True)
        assert not any(torch.allclose(one, other) for one, other in pairs)


@pytest.mark.parametrize("num_tokens", [1, 5, 75, 79], ids=str)  # 75 values an image
def test_every_pixel_affects_every_token(num_tokens):
    encoder = RandomEncoder(num_tokens, 7).double()
    x = images(1).double().requires_grad_()
    features = encoder(x)
    for token in {0, num_tokens // 2, num_tokens - 1}:
        (grad,) = torch.autograd.grad(features[0, token].sum(), x, retain_graph=True)
        assert grad.ne(0).all()
    assert torch.autograd.gradcheck(encoder, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8], ids=str)
def test_keeps_the_dtype_of_the_pixels(dtype):
    encoder = RandomEncoder(5, 7)
    x = (images() * 40 + 100).clamp(0, 255).to(torch.uint8)
    out = encoder(x.to(dtype))
    assert out.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    small = (x.double() / 255).to(torch.float64 if dtype == torch.uint8 else dtype)
    exact = encoder(x.double() / 255)
    torch.testing.assert_close(encoder(small).double(), exact, rtol=0.05, atol=0.05)


def test_images_of_a_row_are_independent():
    encoder = RandomEncoder(5, 7)
    x = images(2, 3)
    out = encoder(x).unflatten(1, (3, 5))
    for row in range(2):
        torch.testing.assert_close(out[row], encoder(x[row]))
    assert encoder(**encoder.example_input()).shape == (1, 5, 7)


def test_compiles_to_one_graph_and_runs_on_meta():
    encoder = RandomEncoder(5, 7)
    x = images()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), encoder(x))
    with torch.device("meta"):
        empty = RandomEncoder(5, 7)
    assert torch.equal(empty.to_empty(device="cpu")(x), encoder(x))
    assert encoder(x.to("meta")).shape == (2, 5, 7)


@pytest.mark.gpu
def test_the_same_on_cuda():
    encoder = RandomEncoder(5, 7, seed=3)
    x = images().double()
    torch.testing.assert_close(encoder(x.cuda()).cpu(), encoder(x), rtol=1e-12, atol=1e-12)


def test_bad_numbers_and_images_are_named():
    with pytest.raises(
        ValueError, match="num_tokens=0 must .*; image_size=-1 must .*; seed=-2 must lie"
    ):
        RandomEncoder(0, 7, seed=-2, image_size=-1)
    with pytest.raises(ValueError, match=r"takes images \[b, c, 8, 8\] .*, got \[2, 3, 5, 5\]"):
        RandomEncoder(5, 7, image_size=8)(images())
    with pytest.raises(ValueError, match=r"takes images \[b, c, h, w\] .*, got \[3, 5, 5\]"):
        RandomEncoder(5, 7)(images()[0])


# --- models with a part without parameters -------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_names_groups_and_the_table(name):
    model = make(name)
    row = describe(model)["encoder"]
    assert (row.tensors, row.parameters, row.trainable, row.dtype) == (0, 0, 0, "-")
    assert "encoder        0           0" in str(describe(model))
    assert [g["name"] for g in param_groups(model, lr={"fusion": 1e-3})] == ["fusion"]
    set_trainable(model, decoder=True, encoder={"encoder": False})
    assert [g["name"] for g in param_groups(model, lr=1e-3)] == ["decoder", "fusion"]
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(
        ValueError, match="Nothing to train in encoder: the model has no such parameters"
    ):
        set_trainable(model, encoder=True)
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(ValueError, match="encoder has no layer that int8_weight_only can quantize"):
        quantize(model, "int8_weight_only", parts="encoder")
    assert not any(key.startswith("encoder") for key in model.state_dict())
    assert list(get_model_state_dict(model)) == list(model.state_dict())


@pytest.mark.parametrize("name", ARCHS)
def test_it_learns_and_the_features_affect_the_logits(name):
    model = make(name, on_missing="participate")
    tokens, given = prompt(name), {"encoder_input": {"images": images()}}
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-2))
    losses = []
    for _ in range(15):
        total, count = next_token_loss(model(tokens, **given), text())
        losses.append(total.detach() / count)
        (total / count).backward()
        assert all(p.grad is not None for p in get_fusion_params(model).values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    moved = {"encoder_input": {"images": images() + 0.5}}
    assert not torch.allclose(model(tokens, **moved), model(tokens, **given))
    # In a batch of text the stand-in has no effect.
    assert torch.equal(model(text()), make_alike(model, name)(text()))


def make_alike(model, name):
    other = make(name)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", ARCHS)
def test_saved_and_loaded(name, tmp_path):
    model = make(name)
    save_fusion(model, tmp_path / "fusion")
    other = make(name)
    with torch.no_grad():
        for parameter in get_fusion_params(other).values():
            parameter.add_(1.0)
    load_fusion(other, tmp_path / "fusion")
    assert same_state(state(model), other)
    assert same_state(state(model), copy.deepcopy(model))
    with pytest.raises(ValueError, match="encoder 'encoder': no format for a RandomEncoder, only"):
        save_pretrained(model, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("name", ARCHS)
def test_generating_equals_the_full_forward(name):
    model = make(name).eval()
    tokens, given = prompt(name), {"encoder_input": {"images": images()}}
    out = generate(model, tokens, **given, max_new_tokens=3, temperature=0)
    for position in range(tokens.shape[1], out.shape[1]):
        logits = model(out[:, :position], **given)[:, -1]
        assert torch.equal(logits.argmax(-1), out[:, position])


def step(rank, name):
    # One rank has an image, the other has none.
    tokens, given = text(), {}
    if rank == 0:
        tokens, given = prompt(name), {"encoder_input": {"images": images()}}
    alone = make(name)
    expected, _ = next_token_loss(alone(tokens, **given), text())
    model = make(name, on_missing="participate")
    shard(model)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    loss, _ = next_token_loss(model(tokens, **given), text())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(p.grad.full_tensor().any() for n, p in get_fusion_params(model).items() if "adapter" in n)
    optimizer.step()
    saved = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0:
        assert set(saved["state"]) == set(get_fusion_params(alone))
    distributed.barrier()


def steps(rank):
    for name in ("cross_attention", "prefix"):
        step(rank, name)


@pytest.mark.distributed
def test_two_ranks_of_which_one_has_an_image():
    run_on_ranks(steps)
