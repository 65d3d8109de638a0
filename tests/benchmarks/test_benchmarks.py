"""Benchmarks run, at a size that says nothing about speed."""

import sys

import pytest
from benchmarks import fusion_embedding, load


def test_fusion_embedding(capsys):
    sizes = ["--vocab", "97", "--width", "5", "--batch", "2", "--length", "11", "--rounds", "3"]
    ratios = fusion_embedding.main(sizes)
    assert len(ratios) == 4
    said = capsys.readouterr().out
    assert "tables 97 + 8 x 5, fp32" in said
    assert said.count("times as fast") == 4
    assert said.count("torchtune  ") == 4


@pytest.mark.slow  # a fresh interpreter imports torchtune and transformers
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_load(capsys, tmp_path):
    sizes = ["--width", "64", "--layers", "6", "--vocab", "101", "--shard", "100KB", "--rounds", "1"]
    ratios = load.main([*sizes, "--layouts", "shards", "--folder", str(tmp_path)])
    assert len(ratios) == 2
    said = capsys.readouterr().out
    assert "6 layers, width 64, vocabulary 101: fp32 in the files, loaded as bf16" in said
    assert f"shards: {len(list((tmp_path / 'shards').glob('*.safetensors')))} of together" in said
    assert said.count("\ntransformers  ") == 1
    assert said.count(", peak ") == 2
