"""``torchfuse export``; runs of the finetune recipe are exported in tests/recipes/test_llava.py."""

import hf
import pytest
import torch
from support import same_state, state

from torchfuse import from_pretrained, save_pretrained
from torchfuse.checkpoint.formats.registry import formats_of
from torchfuse.cli.main import main


def run(*arguments):
    return main(["export", *map(str, arguments)])


def test_a_directory_in_another_dtype(tmp_path, capsys):
    hf.llava(tmp_path / "llava")
    assert run(tmp_path / "llava", tmp_path / "new", "--format", "llava", "--dtype", "bf16") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/new\n"
    expected = from_pretrained(tmp_path / "llava", dtype=torch.bfloat16)
    assert same_state(state(expected), from_pretrained(tmp_path / "new"))


def test_the_formats_are_those_of_whole_models(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        run("runs/lora", "out", "--format", "lava")
    error = capsys.readouterr().err
    names = sorted(format_.name for format_ in formats_of("model") if format_.can_export)
    assert all(name in error.partition("choose from")[2] for name in names)


@pytest.mark.parametrize(
    ("path", "options", "problem"),
    [
        ("none", (), "none is not a directory: give a finetuning run's output_dir"),
        ("fused", (), "The format llava cannot hold this"),
        ("fused", ("--dtype", "fp8"), "dtype must be one of fp32, bf16, got 'fp8'"),
        ("run", (), "lacks the section model"),
    ],
    ids=["path", "format", "dtype", "run"],
)
def test_after_a_mistake_nothing_is_written(tmp_path, capsys, path, options, problem):
    save_pretrained(hf.fused_model(), tmp_path / "fused")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("output_dir: run\n")
    assert run(tmp_path / path, tmp_path / "out", "--format", "llava", *options) == 1
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
