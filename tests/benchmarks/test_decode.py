"""The benchmark of decoding runs, at a size that says nothing about speed."""

import functools

import pytest
import torch
from benchmarks import decode

from torchfuse.generation import session


@pytest.fixture
def traced(monkeypatch):
    @functools.cache
    def compiled(function, device):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")

    monkeypatch.setattr(session, "compiled", compiled)
    torch._dynamo.reset()


def test_decode(capsys, traced):
    sizes = ["--size", "tiny", "--dtype", "fp32", "--rows", "1", "3", "--rounds", "1"]
    ratios = decode.main([*sizes, "--prompt", "7", "--new", "5", "--quantized", "int8_weight_only"])
    assert set(ratios) == {("tiny", "fp32", what) for what in ("compiled", "quantized", "batch")}
    said = capsys.readouterr().out
    assert "figures of a GPU are not measured" in said
    names = ("transformers ", "torchtune ", "torchfuse ")
    rows = [line for line in said.splitlines() if line.startswith(names) and line.endswith("%")]
    assert len(rows) == 2 * 6
    exact = [line for line in rows if "int8" not in line]
    assert all(line.endswith(" 100%") for line in exact), said
    assert "torchfuse compiled, 3 rows / 1: " in said
