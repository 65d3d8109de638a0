import io
import json
import re
import sys
from pathlib import Path

import hf
import pytest
import yaml
from prompt_settings import give_tokenizer
from sample_records import CAT, llava, messages, write_array, write_images, write_lines

from torchfuse.cli.main import main
from torchfuse.data import ImageTransform

SIDE = {"height": 12, "width": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Directories of a decoder with its tokenizer and of an encoder with its processor, and samples."""
    root = tmp_path_factory.mktemp("data")
    hf.llama(root / "llama")
    give_tokenizer(root / "llama")
    hf.clip_tower(root / "clip")
    sizes = {
        "size": SIDE,
        "crop_size": SIDE,
        "image_mean": ImageTransform(12).mean,
        "image_std": [1, 1, 1],
    }
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(sizes))
    write_images(root)
    write_lines(root / "good.jsonl", [llava("<image>w4 w5", "w6", image=CAT)] * 3)
    write_array(
        root / "bad.json",
        [messages("w4", "w5"), messages("<image>w4", "w5"), messages("w4", "w5 " * 70)],
    )
    return root


def write_config(folder, **sections):
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return str(folder / "config.yaml")


def run_config(folder, **data):
    """A configuration that names its directories once, in the section of the model."""
    model = {"_component_": "torchfuse.from_pretrained", "arch": "joint_decoder", "encoder_token": 37}
    model |= {"decoder": str(folder / "llama"), "encoder": str(folder / "clip"), "max_seq_len": 53}
    return write_config(folder, model=model, data=data)


def check(*arguments):
    return main(["check-data", *map(str, arguments)])


def test_files_of_the_command_line(folder, capsys):
    config = run_config(folder)
    assert check(folder / "good.jsonl", "--config", config) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 rows: 0 errors, 0 too long")
    assert "3 images by width x height:\n  5 x 3: 3" in out
    assert check(folder / "good.jsonl", folder / "bad.json", "--config", config, "--workers", 2) == 1
    out = capsys.readouterr().out
    assert out.startswith("6 rows: 1 errors, 1 too long")
    assert f"{folder / 'bad.json'}: 1 errors\n  row 1: the conversation has <image> 1 times" in out
    assert f"{folder / 'bad.json'}: 1 too long\n  row 2: 73 tokens long, and max_seq_len is 53" in out


def test_files_of_the_configuration(folder, capsys):
    train = [{"path": str(folder / "good.jsonl"), "weight": 2.0, "format": "llava"}]
    config = run_config(folder, train=train, test=str(folder / "bad.json"))
    assert check("--config", config) == 1
    assert capsys.readouterr().out.startswith("6 rows: 1 errors, 1 too long")


def test_interpolations_are_resolved(folder, capsys):
    train = {"path": "${root}/bad.json"}
    config = write_config(
        folder,
        root=str(folder),
        output_dir="???",
        log_dir="${output_dir}/logs",
        **yaml.safe_load(Path(run_config(folder, train=train)).read_text()),
    )
    assert check("--config", config) == 1
    assert capsys.readouterr().out.startswith("3 rows: 1 errors, 1 too long")
    assert check("--config", write_config(folder, data={"train": "${rot}/bad.json"})) == 1
    assert "key 'data.train': Interpolation key 'rot' not found" in capsys.readouterr().err


def test_a_transform_that_the_configuration_names(folder, capsys):
    transform = {"_component_": "torchfuse.data.questions.QuestionTransform", "image_token": 37}
    transform |= {"tokenizer": str(folder / "llama"), "image_transform": str(folder / "clip")}
    config = write_config(folder, transform=transform | {"features_per_image": 9, "max_seq_len": 80})
    assert check(folder / "bad.json", "--config", config) == 1
    assert capsys.readouterr().out.startswith("3 rows: 1 errors, 0 too long")


def test_mistakes_are_one_sentence(folder, capsys):
    wrong = run_config(folder, train=[{"path": 3, "wieght": 1.0}, {"path": "a", "weight": "1"}])
    assert check("--config", wrong) == 1
    error = capsys.readouterr().err
    assert "data.train[0]: unknown key wieght; there are path, format, weight, image_root" in error
    assert "data.train[0]: path must be the path of a file, got 3" in error
    assert "data.train[1]: weight cannot be '1'" in error


@pytest.mark.parametrize(
    ("make_config", "file", "complaint"),
    [
        (run_config, "", "Name files to check, or give .*config.yaml a key data.train"),
        (run_config, "gone.json", "gone.json cannot be read: No such file"),
        (write_config, "good.jsonl", r"config.yaml, data\.tokenizer': missing, and must be given"),
        (lambda folder: write_config(folder, data="a.json"), "good.jsonl", "data must be a section"),
        (lambda folder: folder / "gone.yaml", "good.jsonl", "gone.yaml cannot be read"),
    ],
)
def test_other_mistakes(folder, capsys, make_config, file, complaint):
    config = make_config(folder)
    assert check(*([folder / file] if file else []), "--config", config) == 1
    assert re.search(complaint, capsys.readouterr().err)


def test_a_report_is_printed_whatever_the_encoding_of_the_terminal(folder, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    file = write_lines(folder / "snow.jsonl", [llava("<image>w4", "w5", image="\u2603.png")])
    assert check(file, "--config", run_config(folder)) == 1
    out.flush()
    assert b"u2603.png cannot be opened: No such file" in out.buffer.getvalue()
