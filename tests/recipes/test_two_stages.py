"""The adapter first, then the adapter and the encoder, on the digits: stages kept to, breaks without a trace."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchfuse.recipes import finetune

from torchfuse import recipes
from torchfuse.checkpoint.run.checkpoint import load_checkpoint
from torchfuse.naming import named_parameters
from torchfuse.params import read_freeze_meta
from torchfuse.tasks.runs import build_model, load_run

CONFIG = Path(recipes.__file__).parent / "configs" / "digits" / "two_stages.yaml"
TUNE = str(Path(sys.executable).parent / "tune")
BEGIN, STEPS = 2, 4  # the encoder's stage, and the end


class Runs:
    """Runs of the recipe with the configuration of two stages, cut short, saved after every step."""

    def __init__(self, digits, folder):
        self.digits, self.folder = digits, folder

    def config(self, name, train=None, **changes):
        config = yaml.safe_load(CONFIG.read_text()) | {"output_dir": str(self.folder / name)}
        config["freeze"][1]["start_step"] = BEGIN
        config |= {"save_every": 1} | changes
        config["model"]["on_missing"] = "participate"
        config["train"] |= {"max_steps": STEPS, "epochs": 2, "batch_size": 16, "warmup_steps": 0}
        config["train"] |= train or {}
        config["data"] |= {"test": None, "limit": 49}  # three steps an epoch
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        return file

    def here(self, name, monkeypatch, **changes):
        file = self.config(name, **changes)
        monkeypatch.chdir(self.digits.parent)
        monkeypatch.setattr(sys, "argv", ["finetune", "--config", str(file)])
        with torch.random.fork_rng():
            finetune.main()
        return self.folder / name

    def on_two_ranks(self, name, **changes):
        file = self.config(name, {"batch_size": 8}, **changes)
        done = subprocess.run(
            [TUNE, "run", "--nproc_per_node", "2", "torchfuse/recipes/finetune.py", "--config", file],
            cwd=self.digits.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        return self.folder / name

    def broken_off(self, run, behind, name):
        """What a run leaves that ends behind a step."""
        for step in range(1, behind + 1):
            shutil.copytree(
                run / "checkpoints" / f"step_{step}",
                self.folder / name / "checkpoints" / f"step_{step}",
            )

    def encoders(self, run):
        """The encoder's values as pretrained and after each step."""
        config = yaml.safe_load((run / "config.yaml").read_text())
        places = {name: str(self.digits.parent / path) for name, path in config["pretrained"].items()}
        seen = []
        for step in range(STEPS + 1):
            model = build_model(config["model"], places, device="cpu", dtype="fp32")
            if step:
                load_checkpoint(run / "checkpoints" / f"step_{step}", model)
            seen.append({n: p.detach().clone() for n, p in named_parameters(model) if "encoder." in n})
        return seen


@pytest.fixture
def runs(digits, tmp_path):
    return Runs(digits, tmp_path)


def kept_to_its_stage(seen):
    still = [torch.equal(seen[0][name], v[name]) for v in seen[: BEGIN + 1] for name in v]
    # Features are taken in front of the tower's last norm, which never runs.
    run = [name for name in seen[0] if ".ln_post." not in name]
    moved = [not torch.equal(a[n], b[n]) for a, b in pairwise(seen[BEGIN:]) for n in run]
    return all(still) and all(moved) and len(still) > len(seen[0]) > 5


def is_the_same_run(one, other):
    """What was learned, to the bit, and every loss."""
    for name in ("fusion", "trained"):
        a, b = (load_file(run / "fusion" / f"{name}.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    losses, again = (json.loads((run / "losses.json").read_text()) for run in (one, other))
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses == again
    metrics = [json.loads((run / "metrics.json").read_text())["tokens"] for run in (one, other)]
    assert metrics[0] == metrics[1]


# PyTorch looks at it itself where a graph begins at a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_the_encoder_keeps_to_its_stage_and_a_break_leaves_no_trace(runs, monkeypatch, compiled):
    torch.compiler.reset()
    whole = runs.here("whole", monkeypatch, compile=compiled)
    assert kept_to_its_stage(runs.encoders(whole))
    described = json.loads((whole / "fusion" / "fusion.json").read_text())
    assert read_freeze_meta(described["freeze"])[1].start_step == BEGIN
    assert described["trainable"] == {"decoder": False, "encoder": True, "fusion": True}
    for behind in (BEGIN + 1,) if compiled else (1, BEGIN, STEPS - 1, STEPS):
        name = f"broken_off_{behind}"
        runs.broken_off(whole, behind, name)
        is_the_same_run(whole, runs.here(name, monkeypatch, compile=compiled, resume=True))


@pytest.mark.distributed
def test_two_ranks_keep_to_the_stage_and_break_off_and_go_on(runs, monkeypatch):
    whole = runs.on_two_ranks("whole")
    assert kept_to_its_stage(runs.encoders(whole))
    runs.broken_off(whole, BEGIN + 1, "broken_off")
    is_the_same_run(whole, runs.on_two_ranks("broken_off", resume=True))

    # One process takes the same steps, and goes on with what two ranks began.
    runs.broken_off(whole, BEGIN + 1, "taken_over")
    here = {"alone": runs.here("alone", monkeypatch)}
    here["taken_over"] = runs.here("taken_over", monkeypatch, resume=True)
    losses = json.loads((whole / "losses.json").read_text())
    for run in here.values():
        for (_, loss), (_, theirs) in zip(
            losses, json.loads((run / "losses.json").read_text()), strict=True
        ):
            assert loss == pytest.approx(theirs, rel=1e-4)


def test_a_break_leaves_no_trace_where_random_numbers_are_drawn_and_batches_added_up(runs, monkeypatch):
    """Experts of MoMa are chosen with noise; the decoder trains too."""
    moma = yaml.safe_load((CONFIG.parent / "moma.yaml").read_text())
    changes = {"model": moma["model"], "transform": moma["transform"]}
    changes["freeze"] = [
        {"start_step": 0, "specs": [{"module": "*", "frozen": False}]},
        {"start_step": 1, "specs": [{"module": "encoder", "frozen": True}]},
    ]
    train = {"lr": 1e-3, "gradient_accumulation_steps": 2, "batch_size": 8}
    whole = runs.here("whole", monkeypatch, train=train, **changes)
    runs.broken_off(whole, STEPS - 1, "broken_off")
    is_the_same_run(whole, runs.here("broken_off", monkeypatch, train=train, resume=True, **changes))
    assert any(
        name.startswith("decoder.") for name in load_file(whole / "fusion" / "trained.safetensors")
    )
    load_run(whole, device="cpu", dtype="fp32")


def test_a_run_goes_on_as_it_was_begun_or_not_at_all(runs, monkeypatch, capsys):
    train = {"max_steps": 1}
    whole = runs.here("whole", monkeypatch, train=train, resume=True)  # nothing there: a fresh start
    before = load_file(whole / "fusion" / "fusion.safetensors")
    for changes, complaints in (
        ({}, ["step_1 is of an earlier run: resume=true goes on with it"]),
        (
            {"resume": True, "seed": 8, "train": {"max_steps": 3, "batch_size": 8}},
            [
                "is of a run that went otherwise: ",
                "seed was 7 and is 8",
                "train.max_steps was 1 and is 3",
                "questions a step was 16 and is 8",
            ],
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            runs.here("whole", monkeypatch, **({"train": train} | changes))
        said = capsys.readouterr().err
        for complaint in complaints:
            assert complaint in said
    after = load_file(whole / "fusion" / "fusion.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
