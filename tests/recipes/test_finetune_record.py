"""What the finetune recipe records of training, and that evaluating in between changes nothing."""

import json

import pytest
import yaml
from programs import DIGITS, run_program
from torchfuse.recipes import finetune

from torchfuse import get_fusion_params
from torchfuse.data import read_samples
from torchfuse.tasks.runs import load_run


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Run the recipe in this process for one epoch; returns what it wrote."""

    def start(name, model=None, arch="moma", **changes):
        config = yaml.safe_load((DIGITS / f"{arch}.yaml").read_text())
        config |= {"output_dir": str(tmp_path / name)} | changes
        config["model"] |= model or {}
        config["train"] |= {"max_steps": 5, "epochs": 1, "batch_size": 12, "warmup_steps": 0}
        config["data"]["limit"] = 61
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        run_program(finetune, digits.parent, "--config", tmp_path / "config.yaml")
        monkeypatch.chdir(digits.parent)  # the run's configuration holds relative paths
        return tuple(
            json.loads((tmp_path / name / f"{f}.json").read_text()) for f in ("losses", "metrics")
        )

    return start


def test_costs_are_recorded_and_evaluating_in_between_changes_nothing(start, digits, tmp_path, capsys):
    """Of an architecture whose training draws random numbers."""
    experts = {"num_experts": 3, "capacity": 1.0}
    losses, metrics = start("evaluated", experts, eval_every=2, eval_limit=7, eval_batch_size=5)
    printed = capsys.readouterr().out
    plain_losses, plain = start("plain", experts)
    assert losses == plain_losses
    assert len(losses) == metrics["steps"] == 5
    assert [step for step, _ in metrics["accuracy_at_step"]] == [2, 4, 5]
    assert all(
        share * 7 == pytest.approx(round(share * 7), abs=1e-3)
        for _, share in metrics["accuracy_at_step"]
    )
    assert plain["accuracy_at_step"] == []
    assert metrics["after"] == plain["after"]

    model, transform = load_run(tmp_path / "evaluated", device="cpu", dtype="fp32")
    assert metrics["new_parameters"] == sum(p.numel() for p in get_fusion_params(model).values())
    assert 0 < metrics["training_seconds"] < metrics["seconds"]
    assert metrics["tokens"] == plain["tokens"]
    # 60 of 61 questions, in five batches of twelve
    samples = read_samples(digits / "questions" / "train.jsonl")[:61]
    text = [transform.length(sample) - 5 * len(sample.images) for sample in samples]
    assert sum(text) - max(text) <= metrics["tokens"]["text"] <= sum(text) - min(text)
    shown = sum(len(sample.images) for sample in samples)
    assert 5 * (shown - 2) <= metrics["tokens"]["image"] <= 5 * shown
    seconds = sum(metrics["tokens"].values()) / metrics["tokens_per_second"]
    assert seconds == pytest.approx(metrics["training_seconds"], abs=0.06)  # one digit is kept of it
    all_tokens = {"encoder": [1.0] * 3}
    assert metrics["expert_load"] == {f"decoder.layers.{n}": all_tokens for n in range(4)}
    assert f"; {metrics['new_parameters']:,} new parameters\n" in printed
    assert "decoder.layers.3: its experts of encoder took 100%, 100%, 100% of the tokens" in printed


def test_an_architecture_without_experts_has_no_load(start, capsys):
    _, metrics = start("plain", arch="deepstack", data={"train": "demo/questions/train.jsonl"})
    assert "expert_load" not in metrics
    assert "no sample was answered" in capsys.readouterr().out


def test_evaluating_in_between_needs_questions_about_one_image(start, digits, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"question": "two plus three ?", "answer": "five"}) + "\n")
    for test in (None, str(text)):
        data = {"train": "demo/questions/train.jsonl", "test": test}
        with pytest.raises(SystemExit, match="1"):
            start("none", data=data, eval_every=2)
        assert f"there is none in data.test={test}; name a file" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
