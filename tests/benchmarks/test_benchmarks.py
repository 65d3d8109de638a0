"""Benchmarks run, at a size that says nothing about speed."""

from benchmarks import fusion_embedding


def test_fusion_embedding(capsys):
    sizes = ["--vocab", "97", "--width", "5", "--batch", "2", "--length", "11", "--rounds", "3"]
    ratios = fusion_embedding.main(sizes)
    assert len(ratios) == 4
    said = capsys.readouterr().out
    assert "tables 97 + 8 x 5, fp32" in said
    assert said.count("times as fast") == 4
    assert said.count("torchtune  ") == 4
