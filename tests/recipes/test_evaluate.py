"""Scores by group, on samples of which the model answers some right."""

import json
import re
import sys

import pytest
import torch
import yaml
from answered_run import evaluated, lines
from programs import run_program
from torchfuse.recipes import evaluate

from torchfuse.data import padded_collate_images, read_samples
from torchfuse.tasks.runs import load_run

METRICS = ["exact_match", "contained", "vqa_accuracy", "anls", "loss"]


def test_without_new_keys_the_table_is_that_of_accuracy(answered):
    printed = evaluated(answered, questions="second.json")
    assert re.fullmatch(r"question   62\.5%  of 24\nall        62\.5%  of 24\n", printed), printed


def test_metrics_by_several_groups(answered, monkeypatch):
    given = [{"path": f"{name}.json", "image_root": "pictures"} for name in ("second", "third")]
    by = ["kind", "source", "modality", "level"]
    printed = evaluated(
        answered, questions=given, image_root=None, metrics=METRICS, by=by, output_dir="out"
    )
    results = json.loads((answered / "out" / "results.json").read_text())
    assert (results["run"], results["questions"]) == ("run", given)
    means, found = results["results"], lines(answered / "out")
    groups = {
        "kind": {"question": 24, "plain": 1, "all": 25},
        "source": {"second.json": 24, "third.json": 1, "all": 25},
        "modality": {"image": 19, "text": 6, "all": 25},
        "level": {"0": 8, "1": 8, "2": 8, "(none)": 1, "all": 25},
    }
    for name, sizes in groups.items():
        assert {group: row["samples"] for group, row in means[name].items()} == sizes
        assert list(means[name]["all"]) == ["samples", *METRICS]
    for name in METRICS[:-1]:
        scores = [record["scores"][name] for record in found]
        assert means["kind"]["all"][name] == pytest.approx(sum(scores) / 25)
    for record in found:
        right = record["text"].split() in [
            answer.split() for answer in record.get("answers", [record["answer"]])
        ]
        assert record["scores"]["exact_match"] == right
    # Two of ten annotators agree with the model.
    assert [found[number]["scores"]["vqa_accuracy"] for number in (2, 10, 18)] == pytest.approx(
        [0.6] * 3
    )
    assert printed.count("exact_match  contained  vqa_accuracy    anls    loss") == 4
    row = means["modality"]["text"]
    assert re.search(
        rf"^text +{row['exact_match']:.1%} .* {row['loss']:.4f}  of 6$", printed, re.MULTILINE
    )
    assert (answered / "out" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    names = ["predictions.jsonl", "predictions.png", "results.json"]
    assert sorted(path.name for path in (answered / "out").iterdir()) == names
    monkeypatch.chdir(answered)
    check_losses(means, found)


@torch.no_grad()
def check_losses(means, found):
    """The loss is that of torch's cross-entropy, row by row; its means are means over tokens."""
    model, transform = load_run("run", device="cpu", dtype="fp32")
    totals = {}
    samples = [
        s for name in ("second", "third") for s in read_samples(f"{name}.json", image_root="pictures")
    ]
    for sample, record in zip(samples, found, strict=True):
        batch = padded_collate_images([transform(sample)])
        labels = batch.pop("labels")[0, 1:]
        logits = model.eval()(**batch)[0, :-1]
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count = int((labels >= 0).sum())
        assert record["scores"]["loss"] == pytest.approx(float(total / count), rel=1e-5)
        for group in ("image" if sample.images else "text", "all"):
            summed, number = totals.get(group, (0.0, 0))
            totals[group] = summed + float(total), number + count
    expected = {group: total / count for group, (total, count) in totals.items()}
    got = {group: row["loss"] for group, row in means["modality"].items()}
    assert got == pytest.approx(expected, rel=1e-5)


def test_nothing_is_written_if_the_picture_cannot_be(answered, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "draw_predictions", fail)
    file = answered / "evaluate.yaml"
    file.write_text(yaml.safe_dump({"run": "run", "questions": "third.json", "image_root": "pictures"}))
    with pytest.raises(KeyboardInterrupt, match="^$"):
        run_program(evaluate, answered, "--config", file, "output_dir=nothing", "metrics=[loss]")
    assert list((answered / "nothing").iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": ["exact", "anls"]}, "metrics: there is no metric 'exact'; there are exact_match, "),
        ({"metrics": []}, "metrics: no metric is given; there are exact_match, "),
        ({"by": "topic"}, "by must be a field of the samples, got 'topic', which none has; there are "),
        ({"by": 5, "num_shown": -1}, "got 5; num_shown must be at least 0, got -1."),
        ({"by": []}, "by must be a field of the samples or a list of them, got []."),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0."),
        ({"questions": [{"path": "third.json"}]}, "format and image_root are of one file; give them "),
        ({"questions": [{"file": "third.json"}], "image_root": None}, "questions[0]: unknown key file"),
        ({"questions": 3, "image_root": None}, "questions: path must be the path of a file, got 3"),
        ({"questions": "none.json"}, "none.json cannot be read: No such file or directory."),
        ({"questions": "unanswered.json"}, "unanswered.json, row 0 has no answer."),
        ({"output_dir": "third.json/out"}, "output_dir third.json/out: "),
        ({"metric": ["anls"]}, "Configuration key 'metric': unknown; there are run, questions, "),
    ],
    ids=str,
)
def test_mistakes_are_reported_before_the_model_is_loaded(answered, monkeypatch, capfd, keys, message):
    monkeypatch.setattr(evaluate, "read_run", lambda path: not_loaded)
    (answered / "unanswered.json").write_text(json.dumps([{"question": "Number 7?"}]))
    file = answered / "evaluate.yaml"
    given = {"run": "run", "questions": "third.json", "image_root": "pictures"} | keys
    file.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    before = sorted(answered.iterdir())
    with pytest.raises(SystemExit, match="^1$"):
        run_program(evaluate, answered, "--config", file)
    assert message in capfd.readouterr().err
    assert sorted(answered.iterdir()) == before


def not_loaded(*_):
    raise AssertionError("the model is loaded")


def test_a_picture_needs_matplotlib(answered, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="^1$"):
        evaluated(answered, questions="third.json", output_dir="without")
    assert "needs matplotlib: pip install 'torchfuse[demo]'; num_shown=0" in capfd.readouterr().err
    assert not (answered / "without").exists()
    evaluated(answered, questions="third.json", output_dir="without", num_shown=0)
    assert sorted(path.name for path in (answered / "without").iterdir()) == [
        "predictions.jsonl",
        "results.json",
    ]
