"""The decoding benchmark runs, at a size whose speed means nothing."""

import pytest
import torch
from benchmarks import decode
from generation.models import trace_only


@pytest.fixture
def traced(monkeypatch):
    trace_only(monkeypatch)
    yield
    torch._dynamo.reset()


NAMES = ("transformers ", "torchtune ", "torchfuse ")
SIZES = ["--size", "tiny", "--dtype", "fp32", "--rounds", "1", "--prompt", "7", "--new", "5"]


def test_decode(capsys, traced):
    ratios = decode.main([*SIZES, "--rows", "1", "--quantized"])
    assert set(ratios) == {("tiny", "fp32", "compiled")}
    printed = capsys.readouterr().out
    assert "figures of a GPU are not measured" in printed
    rows = [line for line in printed.splitlines() if line.startswith(NAMES) and line.endswith("%")]
    assert len(rows) == 5
    assert all(line.endswith(" 100%") for line in rows), printed


@pytest.mark.long
def test_decode_batches_and_quantized(capsys, traced):
    ratios = decode.main([*SIZES, "--rows", "1", "3", "--quantized", "int8_weight_only"])
    assert set(ratios) == {("tiny", "fp32", what) for what in ("compiled", "quantized", "batch")}
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(NAMES) and line.endswith("%")]
    assert len(rows) == 2 * 6
    exact = [line for line in rows if "int8" not in line]
    assert all(line.endswith(" 100%") for line in exact), printed
    assert "torchfuse compiled, 3 rows / 1: " in printed
