"""The decoding benchmark runs, at a size too small for meaningful speeds."""

from functools import partial

from benchmarks import decode

from torchfuse.generation import session


def test_decode(capsys, monkeypatch):
    monkeypatch.setattr(session, "compiled", lambda function, device: function)
    monkeypatch.setattr(decode, "bytes_per_second", partial(decode.bytes_per_second, numel=1009))
    sizes = ["--size", "tiny", "--dtype", "fp32", "--rows", "1", "3", "--rounds", "1"]
    ratios = decode.main([*sizes, "--prompt", "7", "--new", "5", "--quantized", "int8_weight_only"])
    assert set(ratios) == {("tiny", "fp32", what) for what in ("compiled", "quantized", "batch")}
    printed = capsys.readouterr().out
    assert "figures of a GPU are not measured" in printed
    names = ("transformers ", "torchtune ", "torchfuse ")
    rows = [line for line in printed.splitlines() if line.startswith(names) and line.endswith("%")]
    assert len(rows) == 2 * 6
    exact = [line for line in rows if "int8" not in line]
    assert all(line.endswith(" 100%") for line in exact), printed
    assert "torchfuse compiled, 3 rows / 1: " in printed
