"""``torchfuse describe`` prints what ``describe`` says of the model that is built and loaded."""

import re
import subprocess
import sys
from pathlib import Path

import hf
import pytest
from support import TinyEncoder, tiny_decoder

import torchfuse
from torchfuse import describe, from_pretrained, fuse, recipes, save_fusion, save_pretrained
from torchfuse.cli.main import main
from torchfuse.encoders import ClipVisionEncoder

CONFIG = Path(recipes.__file__).parent / "configs" / "digits" / "cross_attention.yaml"


def run(capsys, path):
    assert main(["describe", str(path)]) == 0
    first, blank, *table = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: ")
    assert not blank
    return first, "\n".join(table).replace("meta", "cpu ")


def columns(table):
    """The cells of a table, without the device."""
    return [
        re.split(r"\s{2,}", line.strip())[:-1] for line in str(table).splitlines() if "-" not in line
    ]


def test_a_directory_of_a_whole_model(tmp_path, capsys):
    encoder = ClipVisionEncoder(
        image_size=14, patch_size=7, embed_dim=12, num_layers=2, num_heads=3, hidden_dim=17
    )
    model = fuse(tiny_decoder(), encoder, every=2)
    save_pretrained(model, tmp_path / "model")
    first, table = run(capsys, tmp_path / "model")
    assert first.endswith("checkpoint in the format torchfuse, DeepFusionModel")
    assert columns(table) == columns(describe(from_pretrained(tmp_path / "model")))


def test_a_decoder(tmp_path, capsys):
    reference = hf.llama(tmp_path / "llama")
    first, table = run(capsys, tmp_path / "llama")
    assert "checkpoint in the format llama" in first
    parameters = sum(p.numel() for p in reference.parameters())
    assert columns(table)[1][:3] == [
        "decoder",
        str(len(list(reference.parameters()))),
        f"{parameters:,}",
    ]


def test_an_artifact(tmp_path, capsys):
    model = fuse(tiny_decoder(), TinyEncoder(), every=2)
    save_fusion(model, tmp_path / "fusion")
    _, table = run(capsys, tmp_path / "fusion")
    assert "architecture  cross_attention" in table
    assert f"{describe(model)['fusion'].parameters:,} parameters" in table


def test_a_configuration_and_a_run_of_it(tmp_path, capsys):
    _, table = run(capsys, CONFIG)
    rows = {row[0]: row for row in columns(table)}
    assert rows["decoder"][3] == "0"
    assert rows["fusion"][2] == rows["fusion"][3].split()[0]
    frozen = "freeze: [{start_step: 0, specs: [{module: adapter, frozen: true}]}]\n"
    (tmp_path / "config.yaml").write_text(CONFIG.read_text() + frozen)
    first, of_run = run(capsys, tmp_path)
    assert "finetuning run" in first
    trains = {row[0]: row[3] for row in columns(of_run)}
    assert trains["fusion"] != rows["fusion"][3]
    assert trains["fusion"] != "0"


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("nowhere", "nowhere does not exist."),
        ("nowhere.yaml", "nowhere.yaml cannot be read"),
        ("empty", "empty"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, path, complaint):
    (tmp_path / "empty").mkdir()
    assert main(["describe", str(tmp_path / path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error


def test_a_configuration_without_a_model(tmp_path, capsys):
    (tmp_path / "some.yaml").write_text("run: demo\n")
    assert main(["describe", str(tmp_path / "some.yaml")]) == 1
    assert "has no section model" in capsys.readouterr().err


def test_the_command_is_a_module_too():
    command = [sys.executable, "-m", "torchfuse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"torchfuse {torchfuse.__version__}\n"
