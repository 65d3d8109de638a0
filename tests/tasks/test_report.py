import time

import pytest
import torch

from torchfuse.tasks import report as report_module
from torchfuse.tasks.report import Report, peak_memory

CPU = torch.device("cpu")


def test_lines():
    report = Report(prompts=3, images=2, prompt_tokens=40, tokens=90)
    report.seconds |= {"encode": 0.5, "prefill": 0.25, "decode": 1.5}
    lines = report.lines(CPU)
    assert lines[:4] == [
        "90 tokens for 3 prompts in 2.25 s on cpu",
        "  images:    2 encoded in 0.500 s",
        "  prefill:   40 tokens in 0.250 s",
        "  decoding:  58.0 tokens/s",
    ]
    assert lines[4].startswith("  memory:    ")
    assert len(Report().lines(CPU)) == 3


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as a list of one number, in place of the real one."""
    now = [0.0]
    monkeypatch.setattr(report_module, "_clock", lambda device: now[0])
    monkeypatch.setattr(report_module, "_compile_seconds", lambda: 0.0)
    return now


def test_each_phase_has_its_own_time(clock):
    report = Report()
    for _ in range(2):
        with report.timing("prefill", CPU) as begin:
            clock[0] += 3
            begin("decode")
            clock[0] += 5
        clock[0] += 7  # outside of every phase
    assert report.seconds == {"prefill": 6, "decode": 10, "compile": 0}


def test_time_before_an_error_counts(clock):
    report = Report()

    def fail():
        with report.timing("encode", CPU):
            clock[0] += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        fail()
    assert report.seconds["encode"] == 3


def test_compiling_is_a_phase_of_its_own():
    report = Report()
    torch._dynamo.reset()

    def backend(graph, _):
        time.sleep(0.2)
        return graph

    started = time.perf_counter()
    with report.timing("decode", CPU):
        torch.compile(torch.sin, backend=backend)(torch.ones(3))
    elapsed = time.perf_counter() - started
    assert report.seconds["compile"] >= 0.2
    assert 0 <= report.seconds["decode"] <= elapsed - report.seconds["compile"]
    torch._dynamo.reset()


def test_peak_memory_is_at_least_the_size_of_a_tensor():
    tensor = torch.ones(30_000_000)
    assert peak_memory(CPU)[0] > tensor.nbytes
