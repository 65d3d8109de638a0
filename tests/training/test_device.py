import pytest
import torch

from torchfuse.errors import ConfigError
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


def test_a_rank_without_a_device_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ConfigError, match=r"local rank 2 has no device .* launch with --nproc_per_node 2"
    ):
        device_and_dtype("cuda", "fp32")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ConfigError, match=r"'cuda:1' cannot be used: You can't specify a device index"):
        device_and_dtype("cuda:1", "fp32")
