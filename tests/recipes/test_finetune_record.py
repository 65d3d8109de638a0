"""What the finetune recipe writes down of training, and that asking in between changes nothing."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torchfuse.recipes import finetune

from torchfuse import get_fusion_params, recipes
from torchfuse.data.questions import read_questions
from torchfuse.tasks.runs import load_run

CONFIGS = Path(recipes.__file__).parent / "configs" / "digits"


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Run the recipe in this process for one epoch; returns what it wrote."""

    def run(name, model=None, arch="moma", **changes):
        config = yaml.safe_load((CONFIGS / f"{arch}.yaml").read_text())
        config |= {"output_dir": str(tmp_path / name)} | changes
        config["model"] |= model or {}
        config["train"] |= {"max_steps": 5, "epochs": 1, "batch_size": 12, "warmup_steps": 0}
        config["data"]["limit"] = 61
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.chdir(digits.parent)
        monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(tmp_path / "config.yaml")])
        with torch.random.fork_rng():
            finetune.main()
        return tuple(
            json.loads((tmp_path / name / f"{f}.json").read_text()) for f in ("losses", "metrics")
        )

    return run


def test_what_training_took_and_that_asking_changes_nothing(start, digits, tmp_path, capsys):
    """Of an architecture whose training draws random numbers."""
    experts = {"num_experts": 3, "capacity": 1.0}
    losses, metrics = start("asked", experts, eval_every=2, eval_limit=7, eval_batch_size=5)
    said = capsys.readouterr().out
    plain, unasked = start("unasked", experts)
    assert losses == plain
    assert len(losses) == metrics["steps"] == 5
    assert [step for step, _ in metrics["accuracy_at_step"]] == [2, 4, 5]
    assert all(
        share * 7 == pytest.approx(round(share * 7), abs=1e-3)
        for _, share in metrics["accuracy_at_step"]
    )
    assert unasked["accuracy_at_step"] == []
    assert metrics["after"] == unasked["after"]

    model, transform = load_run(tmp_path / "asked", device="cpu", dtype="fp32")
    assert metrics["new_parameters"] == sum(p.numel() for p in get_fusion_params(model).values())
    assert 0 < metrics["training_seconds"] < metrics["seconds"]
    assert metrics["tokens"] == unasked["tokens"]
    # 60 of 61 questions, in five batches of twelve
    asked = read_questions(digits / "questions" / "train.jsonl")[:61]
    text = [sum(map(len, transform.encode(q))) - 5 * len(q.images) for q in asked]
    assert sum(text) - max(text) <= metrics["tokens"]["text"] <= sum(text) - min(text)
    shown = sum(len(q.images) for q in asked)
    assert 5 * (shown - 2) <= metrics["tokens"]["image"] <= 5 * shown
    seconds = sum(metrics["tokens"].values()) / metrics["tokens_per_second"]
    assert seconds == pytest.approx(metrics["training_seconds"], abs=0.06)  # one digit is kept of it
    takes_all = {"encoder": [1.0] * 3}
    assert metrics["expert_load"] == {f"decoder.layers.{n}": takes_all for n in range(4)}
    assert f"trained {metrics['new_parameters']:,} new parameters for " in said
    assert "decoder.layers.3: its experts of encoder took 100%, 100%, 100% of the tokens" in said


def test_an_architecture_without_experts_has_no_load(start, capsys):
    _, metrics = start("plain", arch="deepstack", data={"train": "demo/questions/train.jsonl"})
    assert "expert_load" not in metrics
    assert "no question was answered" in capsys.readouterr().out


def test_questions_to_ask_in_between_must_be_there(start, digits, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"question": "two plus three ?", "answer": "five"}) + "\n")
    for test in (None, str(text)):
        data = {"train": "demo/questions/train.jsonl", "test": test}
        with pytest.raises(SystemExit, match="1"):
            start("none", data=data, eval_every=2)
        assert f"there is none in data.test={test}; name a file" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
