"""The benchmark of loading runs, at a size too small for meaningful shares."""

from benchmarks import loading


def test_loading(capsys):
    loading.main("--rows 30 --layers 1 --slots 512 --steps 1 --rounds 1 --workers 0".split())
    printed = capsys.readouterr().out
    assert "packed rows of 512 tokens" in printed
    assert "0 workers: " in printed
