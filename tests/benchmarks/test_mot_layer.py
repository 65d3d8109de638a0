"""The benchmark runs, at a size whose speed means nothing."""

from benchmarks import mot_layer


def test_mot_layer(capsys):
    sizes = "--width 12 --heads 3 --kv-heads 1 --hidden 7 --image 5 --text 3 --batch 2 --rounds 3"
    ratios = mot_layer.main(sizes.split())
    assert list(ratios) == ["forward", "forward + backward"]
    assert all(ratio > 0 for ratio in ratios.values())
    printed = capsys.readouterr().out
    assert "5 image and 3 text tokens, 2 rows, width 12" in printed
    assert printed.count("mot / dense") == 2
