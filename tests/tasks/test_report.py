import time

import pytest
import torch

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


def test_phases_share_out_the_time():
    report = Report()
    started = time.perf_counter()
    with report.timing("prefill", CPU) as begin:
        time.sleep(0.02)
        begin("decode")
        time.sleep(0.04)
    elapsed = time.perf_counter() - started
    assert report.seconds["prefill"] >= 0.02
    assert report.seconds["decode"] >= 0.04
    assert sum(report.seconds.values()) <= elapsed


def test_time_before_an_error_counts():
    report = Report()

    def fail():
        with report.timing("encode", CPU):
            time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        fail()
    assert report.seconds["encode"] >= 0.02


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
    held = torch.ones(30_000_000)
    assert peak_memory(CPU)[0] > held.nbytes
