"""A finetuning run, and files of samples of which it answers some right."""

from __future__ import annotations

import json

import yaml
from own_data import configuration, make_folder
from programs import tune


def make_run(folder):
    """Write a run of two steps, and two files of samples: of one in two the answer is that of the model."""
    make_folder(folder)
    config = configuration(
        folder, model={"decoder_trainable": True}, train={"max_steps": 2, "lr": 0.05, "warmup_steps": 0}
    )
    tune(folder, "torchfuse/recipes/finetune.py", "--config", config)
    records = json.loads((folder / "llava.json").read_text())[:24]
    (folder / "first.json").write_text(json.dumps(records))
    evaluated(folder, questions="first.json", output_dir="first", num_shown=0)
    for number, (record, found) in enumerate(zip(records, lines(folder / "first"), strict=True)):
        record["level"] = number % 3
        if number % 2:
            record["conversations"][-1]["value"] = found["text"]
        if number % 8 == 2:
            record["answers"] = [found["text"]] * 2 + ["It is 2."] * 8
    rest = [{"question": "Number 7?", "answer": "It is 7.", "images": ["7.png"], "kind": "plain"}]
    (folder / "second.json").write_text(json.dumps(records))
    (folder / "third.json").write_text(json.dumps(rest))
    return folder


def evaluated(folder, **keys):
    """Run the recipe; return what it prints."""
    config = {"run": "run", "image_root": "pictures", "max_new_tokens": 7, "batch_size": 5} | keys
    file = folder / "evaluate.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return tune(folder, "torchfuse/recipes/evaluate.py", "--config", file)


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
