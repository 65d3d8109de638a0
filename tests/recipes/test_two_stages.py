"""Training in two stages on the digits: what trains when, and that a resumed run equals an uninterrupted one."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import yaml
from programs import DIGITS, run_program, run_program_on_ranks
from safetensors.torch import load_file
from torchfuse.recipes import finetune

from torchfuse.checkpoint import load_checkpoint
from torchfuse.naming import named_parameters
from torchfuse.params import read_freeze_meta
from torchfuse.tasks.runs import build_model, load_run

CONFIG = DIGITS / "two_stages.yaml"
BEGIN, STEPS = 2, 4  # the first step in which the encoder trains, and the number of steps


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

    def run(self, name, program=run_program, **changes):
        program(finetune, self.digits.parent, "--config", self.config(name, **changes))
        return self.folder / name

    def run_on_two_ranks(self, name, **changes):
        return self.run(name, run_program_on_ranks, train={"batch_size": 8}, **changes)

    def interrupt(self, run, step, name):
        """Make the folder of a run that ended after a step of another run."""
        for saved in range(1, step + 1):
            shutil.copytree(
                run / "checkpoints" / f"step_{saved}",
                self.folder / name / "checkpoints" / f"step_{saved}",
            )

    def encoder_states(self, run):
        """The encoder's values as pretrained and after each step."""
        config = yaml.safe_load((run / "config.yaml").read_text())
        given = {name: path for name, path in config["pretrained"].items() if path is not None}
        paths = {name: str(self.digits.parent / path) for name, path in given.items()}
        states = []
        for step in range(STEPS + 1):
            model = build_model(config["model"], paths, device="cpu", dtype="fp32")
            if step:
                load_checkpoint(run / "checkpoints" / f"step_{step}", model)
            parameters = named_parameters(model)
            states.append({n: p.detach().clone() for n, p in parameters if "encoder." in n})
        return states


@pytest.fixture
def runs(digits, tmp_path):
    return Runs(digits, tmp_path)


def losses(run):
    return json.loads((run / "losses.json").read_text())


def check_stages(states):
    """The encoder equals the pretrained one until its stage begins, and changes in every step of it."""
    assert len(states[0]) > 5
    for state in states[: BEGIN + 1]:
        for name, value in state.items():
            assert torch.equal(states[0][name], value), name
    # Features are taken in front of the tower's last norm, which never runs.
    trained = [name for name in states[0] if ".ln_post." not in name]
    for before, after in pairwise(states[BEGIN:]):
        for name in trained:
            assert not torch.equal(before[name], after[name]), name


def check_equal(one, other):
    """Two runs learned the same, bit for bit, with the same losses."""
    for name in ("fusion", "trained"):
        a, b = (load_file(run / "fusion" / f"{name}.safetensors") for run in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert [step for step, _ in losses(one)] == list(range(1, STEPS + 1))
    assert losses(one) == losses(other)
    tokens = [json.loads((run / "metrics.json").read_text())["tokens"] for run in (one, other)]
    assert tokens[0] == tokens[1]


# PyTorch reads it itself where a graph begins at a layer.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_encoder_trains_in_its_stage_and_a_resumed_run_equals_an_uninterrupted_one(runs, compiled):
    torch.compiler.reset()
    whole = runs.run("whole", compile=compiled)
    check_stages(runs.encoder_states(whole))
    described = json.loads((whole / "fusion" / "fusion.json").read_text())
    assert read_freeze_meta(described["freeze"])[1].start_step == BEGIN
    assert described["trainable"] == {"decoder": False, "encoder": True, "fusion": True}
    for step in (1, BEGIN, STEPS - 1, STEPS):
        runs.interrupt(whole, step, f"interrupted_{step}")
        check_equal(whole, runs.run(f"interrupted_{step}", compile=compiled, resume=True))


@pytest.mark.distributed
def test_two_ranks_follow_the_stages_and_resume(runs):
    whole = runs.run_on_two_ranks("whole")
    check_stages(runs.encoder_states(whole))
    runs.interrupt(whole, BEGIN + 1, "interrupted")
    check_equal(whole, runs.run_on_two_ranks("interrupted", resume=True))

    # One process takes the same steps, and resumes what two ranks began.
    runs.interrupt(whole, BEGIN + 1, "taken_over")
    for run in (runs.run("alone"), runs.run("taken_over", resume=True)):
        for (_, on_ranks), (_, alone) in zip(losses(whole), losses(run), strict=True):
            assert on_ranks == pytest.approx(alone, rel=1e-4)


def test_a_resumed_run_draws_the_same_random_numbers_and_accumulates_the_same_batches(runs, monkeypatch):
    """Experts of MoMa are chosen with noise; the decoder trains too."""
    moma = yaml.safe_load((DIGITS / "moma.yaml").read_text())
    changes = {"model": moma["model"]}
    changes["freeze"] = [
        {"start_step": 0, "specs": [{"module": "*", "frozen": False}]},
        {"start_step": 1, "specs": [{"module": "encoder", "frozen": True}]},
    ]
    changes["train"] = {"lr": 1e-3, "gradient_accumulation_steps": 2, "batch_size": 8}
    whole = runs.run("whole", **changes)
    runs.interrupt(whole, STEPS - 1, "interrupted")
    check_equal(whole, runs.run("interrupted", resume=True, **changes))
    trained = load_file(whole / "fusion" / "trained.safetensors")
    assert any(name.startswith("decoder.") for name in trained)
    monkeypatch.chdir(runs.digits.parent)  # the run's configuration holds relative paths
    load_run(whole, device="cpu", dtype="fp32")


def test_a_run_resumes_with_the_configuration_it_was_started_with_or_is_refused(runs, capsys):
    train = {"max_steps": 1}
    whole = runs.run("whole", train=train, resume=True)  # no checkpoint: it starts at the first step
    before = load_file(whole / "fusion" / "fusion.safetensors")
    for changes, messages in (
        ({}, ["step_1 is of an earlier run: resume it with resume=true"]),
        (
            {"resume": True, "seed": 8, "train": {"max_steps": 3, "batch_size": 8}},
            [
                "was made with a different configuration: ",
                "seed was 7 and is 8",
                "questions a step was 16 and is 8",
            ],
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            runs.run("whole", **({"train": train} | changes))
        printed = capsys.readouterr().err
        for message in messages:
            assert message in printed
    after = load_file(whole / "fusion" / "fusion.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
