"""Runs of the finetune recipe: interrupted, extended, continued, logged, and with steps that go wrong."""

import json
import math
import os
import signal

import pytest
import torch
from own_data import configuration, learned, make_folder, run, same
from programs import run_program
from torch import nn
from torchfuse.recipes import finetune, finetune_trainer

from torchfuse.errors import ConfigError
from torchfuse.training.finite import NonFiniteSteps
from torchfuse.training.interruption import EXIT_CODE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("runs"))


def saved_steps(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


STEPS = {"batch_size": 3, "max_steps": 4, "lr_schedule": "constant", "lr": 0.01}


def test_sigterm_saves_and_the_run_resumes_to_the_same_bits(folder, tmp_path, monkeypatch):
    whole = run(folder, tmp_path, train=STEPS)
    expected = learned(tmp_path / "run")
    take = finetune_trainer.Trainer._train_step

    def interrupted(self, *arguments):
        result = take(self, *arguments)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    output = tmp_path / "interrupted"
    file = configuration(folder, train=STEPS, output_dir=str(output))
    with monkeypatch.context() as patch:
        patch.setattr(finetune_trainer.Trainer, "_train_step", interrupted)
        with pytest.raises(SystemExit, match=f"^{EXIT_CODE}$"):
            run_program(finetune, folder, "--config", file)
    assert saved_steps(output) == ["step_2"]
    assert not (output / "fusion").exists()
    run_program(finetune, folder, "--config", file, "resume=true")
    assert [loss for _, loss in json.loads((output / "losses.json").read_text())] == whole
    assert same(learned(output), expected)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_that_is_extended_equals_one_that_was_longer(folder, tmp_path, capfd):
    whole = run(folder, tmp_path, train=STEPS)
    expected = learned(tmp_path / "run")
    (tmp_path / "two").mkdir()
    short = {"train": STEPS | {"max_steps": 2}, "save_every": 1}
    assert run(folder, tmp_path / "two", **short) == whole[:2]
    assert run(folder, tmp_path / "two", train=STEPS, save_every=1, resume=True) == whole
    assert same(learned(tmp_path / "two" / "run"), expected)
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path / "two", **short, resume=True)
    assert "is of step 4, and the run has 2 steps" in capfd.readouterr().err


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torchao.optim.AdamW8bit"])
def test_the_schedule_of_an_extended_run_is_that_of_its_new_length(folder, tmp_path, optimizer):
    train = {**STEPS, "lr_schedule": "cosine", "optimizer": {"_component_": optimizer}}
    logger = {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(tmp_path)}
    run(folder, tmp_path, train=train | {"max_steps": 2}, save_every=2)
    run(folder, tmp_path, train=train, resume=True, logger={**logger, "filename": "after.txt"})
    rates = [
        float(part.split(":")[1])
        for line in (tmp_path / "after.txt").read_text().splitlines()
        for part in line.split()
        if part.startswith("lr/fusion:")
    ]
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (2, 3)])


def test_the_newest_checkpoints_are_kept_and_the_best(folder, tmp_path, monkeypatch):
    accuracies = iter([0.25, 0.75, 0.5, 0.5])
    monkeypatch.setattr("torchfuse.recipes.finetune_run.accuracy", lambda _: {"all": next(accuracies)})
    monkeypatch.setattr("torchfuse.recipes.finetune_run.evaluate", lambda *_: ([], {}))
    rows = [{"path": str(folder / "llava.json"), "image_root": str(folder / "pictures")}]
    changes = {"save_every": 1, "eval_every": 1, "eval_limit": 1, "data": {"test": rows}}
    run(folder, tmp_path, train=STEPS, keep_last=1, keep_best=True, **changes)
    assert saved_steps(tmp_path / "run") == ["step_2", "step_4"]


def test_a_run_starts_from_what_an_earlier_one_learned(folder, tmp_path):
    earlier = run(folder, tmp_path, train=STEPS | {"max_steps": 1, "lr": 1.0})
    for start in (tmp_path / "run", tmp_path / "run" / "fusion"):
        (tmp_path / start.name).mkdir(exist_ok=True)
        losses = run(folder, tmp_path / start.name, train=STEPS | {"max_steps": 1}, init_from=str(start))
        assert losses != earlier
        again = run(folder, tmp_path / start.name, train=STEPS | {"max_steps": 1, "lr": 0.0})
        assert again == earlier
    whole = run(folder, tmp_path, train=STEPS | {"max_steps": 2, "epochs": 2, "lr": 1.0})
    assert whole[0] == earlier[0]


def test_metrics_are_written_while_the_run_goes_on(folder, tmp_path):
    logger = {
        "_component_": "torchtune.training.metric_logging.DiskLogger",
        "log_dir": str(tmp_path / "logs"),
        "filename": "metrics.txt",
    }
    losses = run(folder, tmp_path, train=STEPS, logger=logger, log_every=2)
    lines = (tmp_path / "logs" / "metrics.txt").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["Step 2", "Step 4"]
    for line, loss in zip(lines, losses[1::2], strict=True):
        names = dict(part.rsplit(":", 1) for part in line.split(" | ")[1].split())
        assert float(names["loss"]) == pytest.approx(loss)
        assert float(names["lr/fusion"]) == 0.01
        assert {"grad_norm", "tokens_per_second/supervised", "seconds/model"} <= names.keys()


@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "torchao.optim.AdamW8bit"])
def test_another_optimizer_resumes_to_the_same_bits(folder, tmp_path, optimizer):
    train = STEPS | {"optimizer": {"_component_": optimizer}}
    whole = run(folder, tmp_path, train=train)
    (tmp_path / "two").mkdir()
    run(folder, tmp_path / "two", train=train | {"max_steps": 2}, save_every=2)
    assert run(folder, tmp_path / "two", train=train, save_every=2, resume=True) == whole
    assert same(learned(tmp_path / "two" / "run"), learned(tmp_path / "run"))


@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder", "mot"])
def test_bf16_keeps_what_trains_in_fp32(folder, tmp_path, arch):
    # Both start from the same weights: torch may draw others in another dtype.
    run(folder, tmp_path, arch=arch, train=STEPS | {"lr": 0.0, "max_steps": 1}, dtype="bf16")
    start = str((tmp_path / "run").rename(tmp_path / "start"))
    exact = run(folder, tmp_path, arch=arch, train=STEPS, init_from=start)
    options = {"train": STEPS, "dtype": "bf16", "init_from": start, "save_every": 2}
    losses = run(folder, tmp_path, arch=arch, **options)
    assert losses != exact
    assert losses[0] == pytest.approx(exact[0], rel=0.01)
    assert losses == pytest.approx(exact, rel=0.05)
    assert {tensor.dtype for tensor in learned(tmp_path / "run").values()} == {torch.float32}


def test_an_optimizer_in_the_backward_pass_changes_nothing(folder, tmp_path):
    train = STEPS | {"clip_grad_norm": None}
    losses = run(folder, tmp_path, train=train)
    expected = learned(tmp_path / "run")
    (tmp_path / "two").mkdir()
    earlier = train | {"max_steps": 2, "optimizer_in_backward": True}
    run(folder, tmp_path / "two", train=earlier, save_every=2)
    again = run(folder, tmp_path / "two", train=earlier | {"max_steps": 4}, save_every=2, resume=True)
    assert again == losses
    assert same(learned(tmp_path / "two" / "run"), expected)


def test_a_step_that_is_not_finite_is_skipped(folder, tmp_path, monkeypatch, capfd):
    backward = finetune_trainer.Trainer._backward

    def broken(self, step, metrics):
        backward(self, step, metrics)
        if self.step == 1:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("nan"))

    monkeypatch.setattr(finetune_trainer.Trainer, "_backward", broken)
    losses = run(folder, tmp_path, train=STEPS)
    assert [step for step, _ in json.loads((tmp_path / "run/losses.json").read_text())] == [1, 3, 4]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["skipped_steps"] == 1
    assert len(losses) == 3
    assert all(tensor.isfinite().all() for tensor in learned(tmp_path / "run").values())


def test_a_step_without_a_supervised_token_moves_nothing(folder, tmp_path, monkeypatch):
    backward, weights = finetune_trainer.Trainer._backward, {}

    def without_labels(self, step, metrics):
        weights[self.step] = [p.detach().clone() for p in self.model.parameters()]
        if self.step == 1:
            for batch in step:
                batch["labels"].fill_(-100)
        backward(self, step, metrics)

    monkeypatch.setattr(finetune_trainer.Trainer, "_backward", without_labels)
    run(folder, tmp_path, train=STEPS | {"weight_decay": 0.5})
    assert [step for step, _ in json.loads((tmp_path / "run/losses.json").read_text())] == [1, 3, 4]
    same = [all(map(torch.equal, weights[step], weights[step + 1])) for step in range(3)]
    assert same == [False, True, False]


def test_too_many_steps_that_are_not_finite(folder, tmp_path, capfd):
    with pytest.raises(SystemExit, match="^1$"):
        run(folder, tmp_path, train=STEPS | {"lr": 1e30, "max_skipped_steps": 1, "clip_grad_norm": None})
    error = capfd.readouterr().err
    assert "2 steps in a row cannot be taken" in error
    assert not (tmp_path / "run" / "fusion").exists()


def test_what_is_not_finite_is_named():
    parts = {"fusion": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)}
    groups = [{"name": name, "params": list(part.parameters())} for name, part in parts.items()]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for part in parts.values():
        part(torch.ones(1, 2)).sum().backward()
    steps = NonFiniteSteps(1)
    assert steps.check(1, 2.0, 1.0, optimizer) is None
    parts["decoder"].weight.grad[0, 0] = float("inf")
    skipped = steps.check(2, 2.0, float("inf"), optimizer)
    assert skipped == "step 2: loss 2.0, gradients of decoder not finite"
    assert steps.check(3, 2.0, 1.0, optimizer) is None
    steps.check(4, 2.0, float("inf"), optimizer)
    with pytest.raises(ConfigError, match=r"^2 steps in a row .*step 5: loss nan, gradients of decoder"):
        steps.check(5, float("nan"), 1.0, optimizer)
