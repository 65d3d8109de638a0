"""The benchmark of packing runs, at a size too small for meaningful speeds."""

from benchmarks import packing


def test_packing(capsys):
    sizes = ["--slots", "190", "--pack", "95", "--layers", "4", "--vocab", "97", "--features", "5"]
    ratios = packing.main([*sizes, "--rounds", "2", "--batches", "1"])
    assert set(ratios) == {"joint_decoder", "cross_attention"}
    printed = capsys.readouterr().out
    assert "at most 190 slots a batch, packs and rows of at most 95" in printed
    assert printed.count("real tokens/s") == 6
    assert printed.count("packed / padded") == printed.count("packed / dense") == 2
