"""Finetune, evaluate and generate on a Llama 3.2 Vision, whose tower cuts images into tiles."""

import json
import sys

import hf
import pytest
import torch
import yaml
from prompt_settings import images, tokenizer
from torchfuse.recipes import evaluate, finetune, generate

from torchfuse import from_pretrained
from torchfuse.data import ImageTransform, read_samples
from torchfuse.tasks.runs import load_run

PER_TILE = 10  # features: a class token and 3 x 3 patches
ROWS = [
    {"question": "<image> w4", "images": ["a.png"], "answer": "w5 w6", "kind": "one"},
    {"question": "w7 <image> w8 <image>", "images": ["b.png", "c.png"], "answer": "w9", "kind": "two"},
    {"question": "w10 w11 w12", "answer": "w13", "kind": "text"},
    {"question": "<image> w14", "images": ["c.png"], "answer": "w15", "kind": "one"},
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a model, data and a configuration, and a function that runs a recipe in it."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path, 12)
    hf.mllama(tmp_path / "mllama")
    tokenizer(tmp_path / "words")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "eyes").mkdir()
    shape, eyes = {"height": 12, "width": 12}, ImageTransform(12)
    eyes = {"crop_size": shape, "size": shape, "image_mean": eyes.mean, "image_std": eyes.std}
    (tmp_path / "eyes" / "preprocessor_config.json").write_text(json.dumps(eyes))

    def run(recipe, **config):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", [recipe.__name__, "--config", "config.yaml"])
        monkeypatch.setattr(sys, "path", [*sys.path])
        recipe.main()

    return run


FINETUNE = {
    "output_dir": "run",
    "model": {"_component_": "torchfuse.from_pretrained", "path": "mllama"},
    "pretrained": {"path": "mllama"},
    "transform": {
        "_component_": "torchfuse.data.questions.QuestionTransform",
        "tokenizer": "words",
        "image_transform": "eyes",
        "image_token": hf.LLAMA["vocab_size"],
        "features_per_image": PER_TILE,
        "scope": "group",
    },
    "data": {"train": "rows.jsonl", "test": "rows.jsonl"},
    "train": {"lr": 0.0, "batch_size": 4, "max_steps": 1},
}


def read_records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def loss_of_rows(transform):
    """The loss a token of all rows, one by one, each image as one tile of the tower's four."""
    model = from_pretrained("mllama").eval()
    total = torch.zeros(())
    count = 0
    for each in read_samples("rows.jsonl"):
        sample, given = transform(each), {}
        if num := len(sample["images"]):
            tiles = torch.zeros(1, num, 4, 3, 12, 12)
            tiles[0, :, 0] = sample["images"]
            mask = torch.zeros(1, len(sample["tokens"]), num, 4, PER_TILE, dtype=torch.bool)
            mask[0, :, :, 0] = sample["encoder_mask"].unflatten(1, (num, PER_TILE))
            given["encoder_input"] = {"images": tiles, "aspect_ratio": torch.ones(1, num, 2)}
            given["encoder_mask"] = mask.flatten(2)
        logits = model(torch.tensor([sample["tokens"]]), **given)[0, :-1]
        labels = torch.tensor(sample["labels"])[1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    return float(total / count)


def test_finetune_evaluate_and_generate_agree(run, tmp_path, capsys):
    run(finetune, **FINETUNE)
    _, transform = load_run("run", device="cpu", dtype="fp32")
    ((_, loss),) = json.loads((tmp_path / "run" / "losses.json").read_text())
    assert loss == pytest.approx(loss_of_rows(transform), rel=1e-5)
    records = read_records(tmp_path / "run" / "answers.jsonl")
    assert len({record["text"] for record in records}) > 1

    capsys.readouterr()
    run(evaluate, run="run", questions="rows.jsonl", batch_size=3)
    shares = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if " of " in line)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert shares == {kind: f"{share:.1%}" for kind, share in metrics["after"].items()}

    longest = {"max_new_tokens": 3}  # two words and the end
    run(
        generate,
        run="run",
        prompts="rows.jsonl",
        output="predicted.jsonl",
        batch_size=2,
        sampling=longest,
    )
    predicted = read_records(tmp_path / "predicted.jsonl")
    assert [record["answer"] for record in predicted] == [record["text"] for record in records]


def test_features_of_whole_images_are_refused(run, capsys):
    transform = FINETUNE["transform"] | {"features_per_image": 4 * PER_TILE}
    with pytest.raises(SystemExit, match="^1$"):
        run(finetune, **FINETUNE | {"transform": transform})
    assert "features_per_image is 40, but 'encoder' makes 10 of an image" in capsys.readouterr().err
