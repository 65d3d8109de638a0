"""What the caller got wrong is one clear sentence, exit code 1, and nothing is written."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from torchfuse.recipes import evaluate, finetune, generate

from torchfuse import recipes

CONFIGS = Path(recipes.__file__).parent / "configs" / "digits"


@pytest.fixture
def demo(digits, tmp_path, monkeypatch):
    """A copy of the demo folder that a test may damage."""
    shutil.copytree(digits, tmp_path / "demo", ignore=shutil.ignore_patterns("run_*", "*_all.jsonl"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "demo"


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def fails(recipe, config, capsys, monkeypatch, *overrides):
    monkeypatch.setattr(sys, "argv", ["recipe", "--config", str(CONFIGS / config), *overrides])
    before = everything(Path.cwd())
    with pytest.raises(SystemExit) as ended:
        recipe.main()
    assert ended.value.code == 1
    assert everything(Path.cwd()) == before
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert "Traceback" not in "".join(said)
    return "\n".join(said)


def break_line(demo):
    file = demo / "questions" / "train.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], '{"question": ', *lines[5:]]))


def break_image(demo):
    first = json.loads((demo / "questions" / "test.jsonl").read_text().splitlines()[0])
    record = first | {"question": "<image> which digit ?", "images": ["../images/broken.png"]}
    (demo / "images" / "broken.png").write_bytes(b"\x89PNG but not really")
    (demo / "questions" / "test.jsonl").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("override", "damage", "complaint"),
    [
        ("learning_rate=1e-3", None, "Configuration key 'learning_rate': "),
        ("train.rate=1e-3", None, "Configuration key 'train.rate': "),
        ("train.epochs=many", None, "Configuration key 'train.epochs': "),
        ("model.evry=2", None, "unknown option 'evry'"),
        ("transform.tokeniser=x", None, "unknown option 'tokeniser'; it takes tokenizer"),
        (
            "model._component_=torchfuse.models.builders.digit",
            None,
            "no component 'torchfuse.models.builders.digit'",
        ),
        ("model.every=9", None, "every=9 fuses no layer of this decoder, which has 4"),
        (
            "pretrained.decoder=demo/images",
            None,
            "demo/images is not a checkpoint: it has no config.json",
        ),
        ("pretrained.encoder=demo/nowhere", None, "demo/nowhere is not a directory"),
        ("pretrained.encoder=demo/llama", None, "model_type 'llama'; known here: clip"),
        ("data.train=demo/nowhere.jsonl", None, "demo/nowhere.jsonl cannot be read"),
        ("seed=7", break_line, "questions/train.jsonl, line 6: no JSON"),
        ("seed=7", break_image, "broken.png is no image that can be opened"),
        ("train.batch_size=999", None, "64 questions are too few for one step of 1 x 999 x 1"),
        ("output_dir=demo/prompt.yaml/run", None, "is no directory that can be written to"),
        ("train.lr={decoder: 1.0}", None, "lr must name the parts that train, fusion; unknown: decoder"),
    ],
)
def test_finetune(demo, capsys, monkeypatch, override, damage, complaint):
    if damage:
        damage(demo)
    assert complaint in fails(finetune, "cross_attention.yaml", capsys, monkeypatch, override)


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ("- question: '<image> which digit ?'\n  images: [images/none.png]\n", "prompt 1: The image "),
        ("- question: '<image> which digit ?'\n", "prompt 1: the question shows <image> 1 times"),
        ("- questin: 'x'\n", "prompt 1: unknown field questin"),
        ("question: x\n", "must hold a list of prompts"),
        ("[", "is no YAML"),
        (None, "prompts.yaml cannot be read"),
    ],
)
def test_generate_prompts(demo, capsys, monkeypatch, prompts, complaint):
    if prompts is not None:
        (demo / "prompts.yaml").write_text(prompts)
    override = "prompts=demo/prompts.yaml"
    assert complaint in fails(generate, "generate.yaml", capsys, monkeypatch, override)


@pytest.mark.parametrize("recipe", [generate, evaluate])
def test_a_run_that_is_none(demo, capsys, monkeypatch, recipe):
    config = f"{recipe.__name__.split('.')[-1]}.yaml"
    said = fails(recipe, config, capsys, monkeypatch, "run=demo/nowhere")
    assert "demo/nowhere/config.yaml cannot be read (No such file or directory)" in said
    (demo / "config.yaml").write_text("model: 3\n")
    said = fails(recipe, config, capsys, monkeypatch, "run=demo")
    assert "demo/config.yaml lacks one of the sections model, pretrained, transform" in said


def test_a_config_that_is_none(demo, capsys, monkeypatch):
    assert "nowhere.yaml" in fails(finetune, "nowhere.yaml", capsys, monkeypatch)
