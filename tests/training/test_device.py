import pytest
import torch

from torchfuse.training.device import device_and_dtype


def test_devices_and_dtypes():
    assert device_and_dtype("cpu", "fp32") == (torch.device("cpu"), torch.float32)
    assert device_and_dtype("cpu", "bf16")[1] is torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cpu", "fp16", "dtype must be one of fp32, bf16, got 'fp16'"),
        ("gpu", "fp32", "device 'gpu' is not a device"),
        ("mps" if torch.cuda.is_available() else "cuda", "fp32", "is not available on this machine"),
        ("meta", "fp32", "device 'meta' is not available"),
    ],
)
def test_devices_and_dtypes_that_are_refused(device, dtype, message):
    with pytest.raises(ValueError, match=message):
        device_and_dtype(device, dtype)
