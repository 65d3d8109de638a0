import pytest
import torch

from torchfuse.training.device import device_and_dtype


def test_what_there_is():
    assert device_and_dtype("cpu", "fp32") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("cpu", "bf16")[1] is torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "complaint"),
    [
        ("cpu", "fp16", "dtype must be one of fp32, bf16, got 'fp16'"),
        ("gpu", "fp32", "device 'gpu' is none"),
        ("mps" if torch.cuda.is_available() else "cuda", "fp32", "is not to be had on this machine"),
        ("meta", "fp32", "device 'meta' is not to be had"),
    ],
)
def test_what_there_is_not(device, dtype, complaint):
    with pytest.raises(ValueError, match=complaint):
        device_and_dtype(device, dtype)
