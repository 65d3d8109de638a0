"""What is broken in torchtune's fusion modules works in ours: a test for each problem.

Problems of names (DCP, prefixes, inner ``layer.``, order) are in test_names.py and in
modules/test_fusion_layer.py; those of generation in test_torchtune_surface.py; waiting ranks in
test_participate.py.
"""

import pickle

import pytest
import torch
from support import FEATURES, IMAGE, TinyEncoder, inputs, open_gates, text, text_with_image, tiny_decoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchfuse import EarlyFusionModel, fuse, get_fusion_params, register_fusion_module
from torchfuse.data.collate import padded_collate_images


def test_a_registered_module_pickles():
    module = nn.Sequential(nn.Linear(3, 5))
    register_fusion_module(module)
    other = pickle.loads(pickle.dumps(module))
    assert other.fusion_params() == ["0.weight", "0.bias"]
    assert list(get_fusion_params(other)) == ["0.weight", "0.bias"]
    other[0] = nn.Identity()
    assert other.fusion_params() == []
    assert module.fusion_params() == ["0.weight", "0.bias"]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile])
def test_fusion_params_are_found_once_in_any_wrapper(wrap):
    model = fuse(tiny_decoder(), TinyEncoder(), every=2, fusion_vocab_size=2)
    expected = get_fusion_params(model)
    for index, layer in enumerate(model.layers):
        model.layers[index] = wrap(layer)
    model.adapter = wrap(model.adapter)
    found = get_fusion_params(wrap(model))
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)


def test_distributed_checkpoints_take_an_early_fusion_model():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    assert list(get_model_state_dict(model)) == [name for name, _ in model.named_parameters()]
    assert "decoder.tok_embeddings.weight" in model.state_dict()


def test_too_many_and_too_few_features_are_named_by_row():
    model = fuse(
        tiny_decoder(), {"image": TinyEncoder()}, arch="joint_decoder", encoder_token={"image": IMAGE}
    )
    tokens = text_with_image()
    for number, got in ((FEATURES + 1, FEATURES + 1), (FEATURES - 2, FEATURES - 2)):
        with pytest.raises(
            ValueError, match=rf"'image'.*row 0 has 7 tokens and {got} features; row 1 has 7"
        ):
            model(tokens, encoder_input={"image": inputs(num=number)})
    # As many in the batch, but not in the rows.
    tokens[0, 2] = 1
    tokens[1, 1] = IMAGE
    with pytest.raises(ValueError, match="row 0 has 6 tokens and 7 features; row 1 has 8 tokens and 7"):
        model(tokens, encoder_input={"image": inputs()})


def test_image_tokens_without_an_image_are_an_error():
    model = fuse(tiny_decoder(), TinyEncoder(), arch="joint_decoder", encoder_token=IMAGE)
    with pytest.raises(ValueError, match="row 0 has 7 tokens and 0 features"):
        model(text_with_image())


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_autocast(arch):
    options = {"encoder_token": IMAGE} if arch == "joint_decoder" else {"every": 2}
    model = fuse(tiny_decoder(), TinyEncoder(), arch=arch, **options)
    tokens = text_with_image() if arch == "joint_decoder" else text()
    exact = model(tokens, encoder_input=inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, encoder_input=inputs())
        out.float().square().mean().backward()
    assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_a_cache_longer_than_the_features_changes_nothing():
    model = open_gates(fuse(tiny_decoder(), TinyEncoder(), every=1)).eval()
    tokens = text(2, 6)
    with torch.no_grad():
        expected = model(tokens, encoder_input=inputs())
        model.setup_caches(2, torch.float32, encoder_max_seq_len=3 * FEATURES, decoder_max_seq_len=6)
        causal = torch.ones(1, 6, 6, dtype=torch.bool).tril().expand(2, -1, -1)
        first = {"mask": causal[:, :5], "input_pos": torch.arange(5)}
        last = {"mask": causal[:, 5:], "input_pos": torch.tensor([5])}
        got = [model(tokens[:, :5], encoder_input=inputs(), **first), model(tokens[:, 5:], **last)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_cached_decoding_compiles_to_one_graph():
    model = open_gates(fuse(tiny_decoder(), TinyEncoder(), every=2)).eval()
    tokens = text(2, 8)
    causal = torch.ones(1, 8, 8, dtype=torch.bool).tril().expand(2, -1, -1)

    def run(call):
        model.setup_caches(2, torch.float32, encoder_max_seq_len=FEATURES, decoder_max_seq_len=8)
        model.reset_caches()
        model(tokens[:, :4], encoder_input=inputs(), mask=causal[:, :4], input_pos=torch.arange(4))
        return [
            call(tokens[:, at : at + 1], mask=causal[:, at : at + 1], input_pos=torch.tensor([at]))
            for at in range(4, 8)
        ]

    with torch.no_grad():
        eager = run(model)
        compiled = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_with_and_without_images_collate():
    def sample(images, length):
        return {
            "tokens": list(range(1, length + 1)),
            "labels": list(range(length)),
            "images": torch.ones(images, 3, 4, 4),
            "encoder_mask": torch.ones(length, images * 5, dtype=torch.bool),
        }

    batch = padded_collate_images([sample(0, 4), sample(2, 6), sample(1, 3)])
    assert batch["encoder_input"]["images"].shape == (3, 2, 3, 4, 4)
    assert batch["encoder_mask"].any(dim=1).sum(dim=1).tolist() == [0, 10, 5]
    assert "encoder_input" not in padded_collate_images([sample(0, 4)])


def test_batched_generation_with_images_is_in_test_generation():
    from torchfuse import generate

    model = fuse(tiny_decoder(), TinyEncoder(), every=2)
    out = generate(model, text(), encoder_input=inputs(), max_new_tokens=2)
    assert out.shape == (2, 15)


def test_right_in_torchtune_and_kept():
    """Rows masked everywhere pass through; zero gates are the base model to the bit."""
    model = fuse(tiny_decoder(), TinyEncoder(), every=1)
    base = tiny_decoder()(text())
    assert torch.equal(model(text(), encoder_input=inputs()), base)
    open_gates(model)
    mask = torch.zeros(2, 13, FEATURES, dtype=torch.bool)
    mask[1] = True
    out = model(text(), encoder_input=inputs(), encoder_mask=mask)
    assert torch.equal(out[0], base[0])
    assert not torch.allclose(out[1], base[1])
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_flat_features_count_through_the_batch():
    """torchtune's way: features of however many images, in the order of the tokens."""
    model = EarlyFusionModel(
        tiny_decoder(),
        {"image": nn.Linear(5, 18)},
        {"image": IMAGE},
        encoders_trainable=True,
        strict=True,
    )
    tokens = text()
    tokens[0, 2:6] = IMAGE
    tokens[1, 4:6] = IMAGE
    x = torch.randn(3, 2, 5)
    flat = model(tokens, encoder_input={"image": {"input": x}})
    rows = torch.zeros(2, 4, 5)
    rows[0], rows[1, :2] = x[:2].flatten(0, 1), x[2]
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    by_row = model(tokens, encoder_input={"image": {"input": rows}}, encoder_mask=valid)
    torch.testing.assert_close(flat, by_row, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the batch has 6 tokens and 8 features"):
        model(tokens, encoder_input={"image": {"input": torch.randn(4, 2, 5)}})
