import pickle

import pytest
import torch
from quantization.models import SCHEMES, distance, quantized_names, small
from torch import nn

from torchfuse import quantize
from torchfuse.errors import ModelError


def linear(*shape, dtype=torch.float32):
    return nn.Linear(*shape, bias=False, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_any_magnitude_keep_their_precision_in_bf16(scheme, scale):
    """Small scales lose bits where a library clamps them."""
    layer = linear(128, 128, dtype=torch.bfloat16)
    layer.weight.mul_(scale)
    x = (scale * torch.randn(11, 128)).bfloat16()
    expected = layer(x)
    quantize(layer, scheme)
    assert distance(layer(x), expected) < SCHEMES[scheme]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_zeros_stay_zero(scheme, dtype):
    """As a padded vocabulary has them; of NF4 also all blocks that share the scale of their scales."""
    layer, x = linear(128, 384, dtype=dtype), torch.randn(5, 128).to(dtype)
    zeros = [7, 131, *range(256, 384)]
    layer.weight[zeros] = 0
    expected = layer(x)
    quantize(layer, scheme)
    found = layer(x)
    assert not found[:, zeros].any()
    assert distance(found, expected) < SCHEMES[scheme]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_the_smallest_numbers_stay_finite(scheme, dtype):
    layer, x = linear(128, 128, dtype=dtype), torch.randn(5, 128).to(dtype)
    layer.weight[7] = 0
    layer.weight[7, ::3] = torch.finfo(dtype).tiny
    layer.weight[11] = 0
    layer.weight[11, ::3] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    quantize(layer, scheme)
    assert layer(x).isfinite().all() and layer(x)[:, [7, 11]].abs().max() < 1e-2


@pytest.mark.parametrize("shape", [(17, 5), (3, 13), (2, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["int8_weight_only", "float8_weight_only"])
def test_narrow_layers_are_quantized(scheme, shape):
    """Where the scales may take more bytes than the values."""
    layer, x = linear(*shape), torch.randn(3, shape[0])
    expected = layer(x)
    quantize(layer, scheme)
    assert quantized_names(layer) == {"weight"}
    assert distance(layer(x), expected) < 0.1


@pytest.mark.parametrize("scheme", ["int8_weight_only", "float8_weight_only", "int8_dynamic"])
def test_layers_of_width_one_are_kept(scheme):
    model = nn.Sequential(linear(1, 17), linear(17, 5))
    result = quantize(model, scheme)
    assert quantized_names(model) == set(result.quantized) == {"1.weight"}
    assert result.kept["0.weight"].startswith("[17, 1] is not wider than")


# torch itself cannot unpickle a float8 tensor.
@pytest.mark.parametrize("scheme", sorted(SCHEMES.keys() - {"float8_weight_only"}))
def test_a_quantized_layer_can_be_pickled(scheme):
    layer, x = linear(128, 128), torch.randn(3, 128)
    quantize(layer, scheme)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_a_scheme_that_does_not_run_is_refused_and_those_that_do_are_named(monkeypatch):
    from torchao.quantization import Float8Tensor

    def unsupported(*args, **kwargs):
        raise RuntimeError("no kernel image\nfor this device")

    model = small()
    weights = [id(p) for p in model.parameters()]
    monkeypatch.setattr(Float8Tensor, "from_hp", unsupported)
    with pytest.raises(
        ModelError,
        match=r"float8_weight_only does not run on cpu in float32 \(RuntimeError: no kernel image\); "
        r"schemes that do: int8_weight_only, int8_dynamic, nf4$",
    ):
        quantize(model, "float8_weight_only")
    assert [id(p) for p in model.parameters()] == weights
    quantize(model, "int8_weight_only")


def test_trying_a_scheme_draws_no_random_numbers():
    layer = linear(17, 5)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    quantize(layer, "int8_weight_only")
    assert torch.equal(torch.rand(3), expected)


def test_settings_of_the_process_are_unchanged():
    import torch._inductor.config as inductor

    before = (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision())
    for scheme in SCHEMES:
        quantize(linear(128, 128), scheme)
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before
