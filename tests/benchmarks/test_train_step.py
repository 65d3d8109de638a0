"""The benchmark of training steps runs, at sizes whose speed means nothing."""

import sys

import pytest
from benchmarks import linear_loss, train_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")

TINY = ["--size", "tiny", "--rounds", "1", "--threads", "1"]


def test_supervised_positions(capsys):
    ratios = train_step.main([*TINY, "--together", "--length", "37", "--supervised", "20", "100"])
    assert set(ratios) == {("cross_attention", 20), ("cross_attention", 100)}
    printed = capsys.readouterr().out
    assert "2 x 37 tokens, 14 labels" in printed
    assert printed.count("gradients differ by") == 2 * 3
    assert printed.count("time / ") == printed.count("memory / ") == 2


def test_visual_questions(capsys):
    sizes = ["--together", "--length", "151", "--rows", "3", "--batch", "visual"]
    ratios = train_step.main([*TINY, *sizes, "--archs", "cross_attention", "joint_decoder"])
    assert set(ratios) == {("cross_attention", "padded"), ("joint_decoder", "padded")}
    assert capsys.readouterr().out.count("\ntorchfuse, packed ") == 2


@pytest.mark.long  # each implementation is a process of its own
def test_processes_and_everything_trained(capsys):
    ratios = train_step.main([*TINY, "--full", "--length", "37", "--supervised", "30"])
    assert set(ratios) == {("cross_attention", 30)}
    assert "everything trains" in capsys.readouterr().out


def test_the_loss_alone(capsys):
    sizes = [
        "--width",
        "11",
        "--vocab",
        "37",
        "--length",
        "23",
        "--chunk",
        "5",
        "--rounds",
        "1",
        "--full",
    ]
    ratios = linear_loss.main([*sizes, "--supervised", "30"])
    assert ratios[30].keys() >= {"torchfuse", "all logits"}
    assert ratios[30]["torchfuse"] == 1
    assert "30 % supervised: 14 of 46 positions" in capsys.readouterr().out
