import logging
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch

import torchfuse_torchao

ROOT = Path(__file__).parents[1]


def run(code: str, **environment: str) -> str:
    """Run a program that must not write to stderr, with the tree on the path; return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout


LISTED = """
import sys
def listed(*names):
    return [name for name in names if name in sys.modules]
"""


@pytest.mark.skipif(
    not any(
        entry.value == "torchfuse_torchao:install" for entry in entry_points(group="torch.backends")
    ),
    reason="needs the installed entry point",
)
def test_torchtune_can_be_imported_before_torchfuse():
    """As the command ``tune`` does."""
    code = """
import torch
print(listed("torchfuse", "torchtune", "torchao", "torchao.dtypes.nf4tensor"))
import torchtune.training
print(listed("torchfuse", "torchao.dtypes.nf4tensor"))
"""
    assert run(LISTED + code) == "[]\n['torchao.dtypes.nf4tensor']\n"


def test_torchfuse_installs_the_hook_where_there_is_no_entry_point():
    """And the module that every ``import torch`` imports brings no other."""
    code = """
import torch
before = set(sys.modules)
import torchfuse_torchao
torchfuse_torchao.install()
print(set(sys.modules) - before)
import torchfuse
print(listed("torchtune", "torchao"), sys.meta_path.count(torchfuse_torchao._hook))
import torchtune.training
print(listed("torchao.dtypes.nf4tensor"))
"""
    out = run(LISTED + code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert out == "{'torchfuse_torchao'}\n[] 1\n['torchao.dtypes.nf4tensor']\n"


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins for torchao: a module that was moved, and one from which a name was removed."""
    monkeypatch.setattr(torchfuse_torchao, "_MOVED", {"fake.old": "fake.new"})
    monkeypatch.setattr(torchfuse_torchao, "_REMOVED", {"fake": ("present", "absent")})
    modules = {name: ModuleType(name) for name in ("fake", "fake.new")}
    modules["fake"].present = "untouched"
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fake.old", raising=False)
    return modules


def test_what_is_missing_is_added(fake, monkeypatch):
    torchfuse_torchao._add_missing_names.__wrapped__()
    assert sys.modules.pop("fake.old") is fake["fake.new"]
    assert fake["fake"].present == "untouched"
    with pytest.raises(NotImplementedError, match=r"torchao .* has no fake\.absent.*'4w' and '8da4w'"):
        fake["fake"].absent(groupsize=32)


def test_modules_that_exist_are_not_replaced(fake, monkeypatch):
    old = ModuleType("fake.old")
    monkeypatch.setitem(sys.modules, "fake.old", old)
    torchfuse_torchao._add_missing_names.__wrapped__()
    assert sys.modules["fake.old"] is old


def test_torchtunes_nf4_is_that_of_torchao():
    from torchtune.modules.peft import LoRALinear

    from torchfuse.quantization.schemes import convert

    layer = LoRALinear(512, 128, rank=3, alpha=6.0, quantize_base=True)
    assert type(layer.weight.data) is type(convert(torch.randn(128, 512), "nf4"))
    torch.nn.init.normal_(layer.lora_b.weight)
    x = torch.randn(5, 512, requires_grad=True)
    weight = layer.weight.get_original_weight() + 2 * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad((x @ weight.T).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Deprecation")
@pytest.mark.parametrize("name", ["Int4WeightOnlyQuantizer", "Int8DynActInt4WeightQuantizer"])
def test_torchtunes_quantizers_raise_where_torchao_has_no_kernels_for_them(name):
    import torchao.quantization
    from torchtune.training import quantization

    if torchao.quantization.int4_weight_only.__module__ != torchfuse_torchao.__name__:
        pytest.skip("torchao has what they call")
    with pytest.raises(NotImplementedError, match=r"torchao .* has no torchao\."):
        getattr(quantization, name)().quantize(torch.nn.Linear(256, 128))


def test_only_messages_about_torchaos_build_are_hidden():
    from torchao.quantization import MappingType

    def shown(logger, message, *args):
        record = logging.LogRecord(logger, logging.WARNING, __file__, 1, message, args, None)
        return bool(logging.getLogger(logger).filter(record))

    torchfuse_torchao.install()
    assert not shown(
        "torchao", "Skipping import of cpp extensions due to incompatible torch version 2.15"
    )
    assert shown("torchao", "Failed to load the kernels")
    enum = "%s is an Enum subclass and is now natively supported by torch.compile."
    assert not shown("torch.utils._pytree", enum, MappingType)
    assert shown("torch.utils._pytree", enum, logging.LogRecord)
    assert shown("torch.utils._pytree", "%s is something else.", MappingType)
    assert shown("torch.utils._pytree", "no arguments")
