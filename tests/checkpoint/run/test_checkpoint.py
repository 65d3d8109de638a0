import fcntl
import math
import os
import signal
import time

import pytest
import torch
from checkpoint.run.dcp_support import FROZEN, adamw, contents, differences, make, refused, trained
from contract import views
from ranks import run_on_ranks
from support import inputs, text
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from torchfuse import get_fusion_params, param_groups, set_trainable
from torchfuse.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from torchfuse.checkpoint.run import dcp_storage
from torchfuse.errors import CheckpointError, ConfigError
from torchfuse.naming import named_parameters
from torchfuse.params import freeze_params
from torchfuse.training import shard


@torch.no_grad()
def spoil(model, optimizer):
    """Change everything at once, as the next steps of training would."""
    for parameter in model.parameters():
        parameter.add_(1.0)
    for state in optimizer.state.values():
        for value in state.values():
            value.add_(1.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.5


# --- ranks ---------------------------------------------------------------------------------------


def _two_ranks(rank, folder):
    model = make()
    shard(model)
    optimizer = adamw(model)
    views.step(model, optimizer)
    views.step(model, optimizer)
    at = contents(model, optimizer)
    save_checkpoint(folder / "two", model, optimizer, step=2, extra={"position": 97})
    assert (folder / "two" / "step_2").is_dir()  # on every rank, at once
    views.step(model, optimizer)
    after = contents(model, optimizer)

    fresh = make(5, train=False)
    shard(fresh)
    loaded = load_checkpoint(folder / "two", fresh)
    assert loaded.step == 2 and loaded.extra == {"position": 97}
    assert FROZEN not in loaded.trainable and len(loaded.trainable) > 20
    again = adamw(fresh)
    load_checkpoint(folder / "two", fresh, again)
    assert not differences(at, contents(fresh, again))
    views.step(fresh, again)
    assert not differences(after, contents(fresh, again))

    save = save_checkpoint(folder / "async", model, optimizer, step=3, asynchronous=True)
    views.step(model, optimizer)  # the ranks talk about gradients and about the checkpoint at once
    spoil(model, optimizer)
    spoiled = contents(model, optimizer)
    assert save.wait() == folder / "async" / "step_3"
    load_checkpoint(folder / "async", fresh, again)
    assert not differences(after, contents(fresh, again))

    load_checkpoint(folder / "one", model, optimizer)
    assert differences(spoiled, contents(model, optimizer))
    assert not differences(torch.load(folder / "one.pt"), contents(model, optimizer))

    with pytest.raises(ValueError, match="the ranks disagree: 10, 11"):
        save_checkpoint(folder / "two", model, step=10 + rank)
    with pytest.raises(ValueError, match="already contains step_2; remove it"):
        save_checkpoint(folder / "two", model, step=2)
    bad = {} if rank == 0 else {"object": object()}
    with pytest.raises(ValueError, match=r"extra\['object'\] is an? object"):
        save_checkpoint(folder / "two", model, step=4, extra=bad)
    before = contents(fresh, again)
    with pytest.raises(ValueError, match="AdamW was saved, this is SGD"):
        load_checkpoint(folder / "two", fresh, torch.optim.SGD(param_groups(fresh, lr=1.0)))
    torch.distributed.barrier()
    if rank == 0:
        os.truncate(folder / "async" / "step_3" / "__1_0.distcp", 100)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"__1_0\.distcp is cut off"):
        load_checkpoint(folder / "async", fresh, again)
    assert not differences(before, contents(fresh, again))
    left_out_runs(folder / "left_out", shard)
    if rank == 0:
        torch.save({"at": at, "after": after}, folder / "two.pt")


@pytest.mark.format(
    "distributed checkpoint (DCP)",
    "in and out",
    "two ranks, one and two again: parameters and optimizer state to the bit",
)
@pytest.mark.distributed
def test_ranks_save_and_load_what_any_other_number_saved(tmp_path):
    model, optimizer = trained(3)
    save_checkpoint(tmp_path / "one", model, optimizer, step=2)
    torch.save(contents(model, optimizer), tmp_path / "one.pt")
    run_on_ranks(_two_ranks, tmp_path)

    of_two_ranks = torch.load(tmp_path / "two.pt")
    fresh = make(5, train=False)
    assert load_checkpoint(tmp_path / "two" / "step_2", fresh).extra == {"position": 97}
    again = adamw(fresh)
    load_checkpoint(tmp_path / "two", fresh, again)
    assert not differences(of_two_ranks["at"], contents(fresh, again))
    views.step(fresh, again)
    after = contents(fresh, again)
    assert of_two_ranks["after"].keys() == after.keys()
    for key, value in after.items():  # the batch is the same in both runs
        torch.testing.assert_close(value, of_two_ranks["after"][key], msg=str(key))


# --- one process ---------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": adamw,
    "amsgrad": lambda m: torch.optim.AdamW(param_groups(m, lr=1e-2), amsgrad=True),
    "tensor-lr": lambda m: torch.optim.Adam(param_groups(m, lr=torch.tensor(1e-2)), foreach=False),
    "sgd": lambda m: torch.optim.SGD(param_groups(m, lr=1e-2)),
    "momentum": lambda m: torch.optim.SGD(param_groups(m, lr=1e-2), momentum=0.9),
    "adafactor": lambda m: torch.optim.Adafactor(param_groups(m, lr=1e-2)),
    "all-parameters": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),  # frozen ones too
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind):
    build = OPTIMIZERS[kind]
    model, optimizer = trained(0, build)
    save_checkpoint(tmp_path, model, optimizer, step=2)
    at = contents(model, optimizer)
    fresh, again = trained(5, build, steps=1)
    kept = {key: again.param_groups[0].get(key) for key in ("foreach", "betas")}
    assert differences(at, contents(fresh, again))
    load_checkpoint(tmp_path, fresh, again)
    assert not differences(at, contents(fresh, again))
    assert {key: again.param_groups[0].get(key) for key in kept} == kept
    assert isinstance(again.param_groups[0]["lr"], type(optimizer.param_groups[0]["lr"]))
    views.step(model, optimizer)
    views.step(fresh, again)
    assert not differences(contents(model, optimizer), contents(fresh, again))


def test_state_of_another_dtype_than_its_parameter_keeps_it(tmp_path):
    def run(seed):
        torch.manual_seed(seed)
        model = nn.Linear(3, 5, dtype=torch.bfloat16)
        optimizer = torch.optim.NAdam(model.parameters(), lr=0.1)
        model(torch.randn(2, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = run(1)
    assert optimizer.state[model.bias]["mu_product"].dtype == torch.float32
    save_checkpoint(tmp_path, model, optimizer, step=1)
    fresh, again = run(2)
    load_checkpoint(tmp_path, fresh, again)
    assert not differences(contents(model, optimizer), contents(fresh, again))


def test_an_optimizer_that_has_not_stepped(tmp_path):
    model, optimizer = trained(steps=0)
    save_checkpoint(tmp_path, model, optimizer, step=0)
    assert not optimizer.state
    fresh, again = trained(5, steps=1)
    load_checkpoint(tmp_path, fresh, again)
    assert not again.state
    assert not differences(contents(model, optimizer), contents(fresh, again))


def test_schedulers_and_other_values_come_back(tmp_path):
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=11)
    optimizer.step()
    scheduler.step()
    extra = {"scheduler": scheduler.state_dict(), "best": math.inf, "files": ["a", None, {"b": -3}]}
    save_checkpoint(tmp_path, model, optimizer, step=3, extra=extra)
    fresh, again = trained(5, steps=0)
    loaded = load_checkpoint(tmp_path, fresh, again)
    assert loaded.extra == extra
    assert [g["initial_lr"] for g in again.param_groups] == [1e-2] * len(again.param_groups)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(again, T_max=11, last_epoch=1)
    other.load_state_dict(loaded.extra["scheduler"])
    for one, its in ((optimizer, scheduler), (again, other)):
        one.step()
        its.step()
    assert scheduler.get_last_lr() == other.get_last_lr()


@pytest.mark.parametrize("wrap", views.WRAPPERS[1:], ids=lambda w: w.__name__)
def test_wrappers_leave_no_trace(tmp_path, wrap):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, step=1)
    wrapped = wrap(make(5))
    again = adamw(wrapped)
    load_checkpoint(tmp_path, wrapped, again)
    views.step(wrapped, again)
    views.step(model, optimizer)
    save_checkpoint(tmp_path, wrapped, again, step=2)
    fresh, third = trained(7, steps=0)
    assert load_checkpoint(tmp_path, fresh, third).step == 2
    assert not differences(contents(model, optimizer), contents(fresh, third))


def test_buffers_and_shared_parameters(tmp_path):
    def build():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        model.register_buffer("passing", torch.rand(2), persistent=False)
        return model

    model, fresh = build(), build()
    model(torch.randn(7, 3))
    passing = fresh.passing.clone()
    save_checkpoint(tmp_path, model, step=0)
    load_checkpoint(tmp_path, fresh)
    assert model[1].num_batches_tracked == 1
    assert not differences(contents(model), contents(fresh))
    assert fresh[2].weight is fresh[0].weight
    assert torch.equal(fresh.passing, passing)


def test_frozen_parts_of_a_loaded_model_are_in_evaluation_mode(tmp_path):
    model = make()
    set_trainable(model)
    save_checkpoint(tmp_path, model, step=0)
    fresh = make()
    fresh.train()
    load_checkpoint(tmp_path, fresh)
    modes = {n: m.training for n, m in model.train().named_modules()}
    assert {n: m.training for n, m in fresh.named_modules()} == modes
    assert set(modes.values()) == {True, False}


def test_the_logits_of_a_loaded_model_are_the_saved_one_s(tmp_path):
    model, _ = trained()
    save_checkpoint(tmp_path, model, step=2)
    fresh = make(5)
    load_checkpoint(tmp_path, fresh)
    assert torch.equal(fresh(text(), encoder_input=inputs()), model(text(), encoder_input=inputs()))


# --- asynchronous --------------------------------------------------------------------------------


def test_an_asynchronous_save_has_the_values_of_the_call(tmp_path):
    model, optimizer = trained()
    fresh, again = trained(5)
    extra = {"position": [3]}
    expected = []
    for step in (3, 4, 5):
        spoil(model, optimizer)
        expected.append(contents(model, optimizer))
        save_checkpoint(tmp_path, model, optimizer, step=step, extra=extra, asynchronous=True)
        extra["position"].append(step)
        spoil(model, optimizer)
    save_checkpoint(tmp_path, model, optimizer, step=6)  # waits for the one before
    for step, values in zip((3, 4, 5), expected, strict=True):
        loaded = load_checkpoint(tmp_path / f"step_{step}", fresh, again)
        assert loaded.extra["position"] == [3, *range(3, step)]
        assert not differences(values, contents(fresh, again))
    assert load_checkpoint(tmp_path, fresh, again).step == 6
    assert not differences(contents(model, optimizer), contents(fresh, again))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["now", "later"])
def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch, asynchronous):
    def fails(path):
        raise ArithmeticError("a mistake")

    model, _ = trained()
    message = r"step_1 was not saved: rank 0: ArithmeticError.*mistake"
    with monkeypatch.context() as patch:
        patch.setattr(dcp_storage, "fsync_tree", fails)
        with pytest.raises(RuntimeError, match=message):
            save_checkpoint(tmp_path, model, step=1, asynchronous=asynchronous).wait()
        assert os.listdir(tmp_path) == []
        if asynchronous:  # the next save raises the error of one that was not waited for
            save_checkpoint(tmp_path, model, step=1, asynchronous=True)
            with pytest.raises(RuntimeError, match=message):
                save_checkpoint(tmp_path, model, step=2)
    save_checkpoint(tmp_path, model, step=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1"


# --- the folder ----------------------------------------------------------------------------------


def test_latest_is_by_number_and_of_whole_checkpoints(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for name in ("step_9", "step_10", "step_011", "step_12.old", ".step_13.0a0a0a0a.tmp", "step_x"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"


LEFTOVERS = [".step_3.0a0a0a0a.tmp", ".step_3.0a0a0a0a.saving"]  # the second by an earlier version


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    foreign = [
        ".step_3",
        ".step_3.0a0a0a0a",
        "step_3.0a0a0a0a.tmp",
        ".step_3.mine.tmp",
        ".x.0a0a0a0a.tmp",
    ]
    for name in [*LEFTOVERS, *foreign]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    save_checkpoint(tmp_path, nn.Linear(3, 5), step=4)
    assert set(os.listdir(tmp_path)) == {*foreign, "step_4"}


def test_one_process_saves_into_a_folder_at_a_time(tmp_path):
    (tmp_path / LEFTOVERS[0]).mkdir()
    with (tmp_path / ".saving.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another process is saving into"):
            save_checkpoint(tmp_path, nn.Linear(3, 5), step=4)
        assert (tmp_path / LEFTOVERS[0]).is_dir()  # it may be the other process's
    save_checkpoint(tmp_path, nn.Linear(3, 5), step=4)
    assert os.listdir(tmp_path) == ["step_4"]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_forked_during_a_save_do_not_keep_the_folder_locked(tmp_path, monkeypatch):
    children = []

    def fork(path):
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(600)
            os._exit(0)
        fsync_tree(path)

    fsync_tree = dcp_storage.fsync_tree
    monkeypatch.setattr(dcp_storage, "fsync_tree", fork)
    try:
        save_checkpoint(tmp_path, nn.Linear(3, 5), step=4)
        save_checkpoint(tmp_path, nn.Linear(3, 5), step=5)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert len(children) == 2


def test_all_that_cannot_be_saved_is_said_at_once(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            raise AssertionError

    loop: list = []
    loop.append(loop)
    model = nn.Sequential(Extra(3, 5), nn.Linear(2, 2, device="meta"))
    optimizer = torch.optim.LBFGS(model[0].parameters())
    optimizer.state[model[0].weight]["old_dirs"] = []
    extra = {"a": {3: 1}, "b": (1,), "c": torch.ones(1), "d": loop}
    with pytest.raises(ValueError, match="nothing was written") as caught:
        save_checkpoint(tmp_path / "new", model, optimizer, step=-1, extra=extra)
    for problem in (
        "_extra_state is a dict: a checkpoint of a model holds tensors only",
        "model.1.weight is on the meta device",
        "step must be a whole number from 0 on, not -1",
        "extra['a'] has keys that are no strings: 3",
        "extra['b'] is a tuple",
        "extra['c'] is a Tensor",
        "nested too deeply, or within itself",
        "optimizer state 'old_dirs' of 0.weight is a list",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ValueError, match="extra must be a mapping, not a list"):
        save_checkpoint(tmp_path / "new", nn.Linear(3, 5), step=0, extra=[1])
    with pytest.raises(ValueError, match="the optimizer holds 2 parameters that are not the model's"):
        save_checkpoint(tmp_path / "new", nn.Linear(3, 5), optimizer, step=0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; checkpoints are written into a directory"):
        save_checkpoint(tmp_path / "file", nn.Linear(3, 5), step=0)


# --- what is left out ----------------------------------------------------------------------------


def stored_names(path):
    return {n.removeprefix("model.") for n in FileSystemReader(path).read_metadata().state_dict_metadata}


def left_out_runs(folder, prepare):
    """One in which the decoder's second layer trains, and a fresh one over the same base."""
    runs = []
    for seed in (3, 4):
        torch.manual_seed(seed)  # what fusion added starts elsewhere
        model = make(3, train=False)
        freeze_params(model, "decoder.layers.1", "decoder.tok_embeddings", frozen=False)
        prepare(model)
        runs += [model, adamw(model)]
    model, optimizer, fresh, again = runs
    views.step(model, optimizer)
    views.step(model, optimizer)
    trained = [name for name, p in named_parameters(model) if p.requires_grad]
    save_checkpoint(folder, model, optimizer, step=2, trained=trained)
    before = contents(fresh, again)
    load_checkpoint(folder, fresh, again)
    after = contents(model, optimizer)
    assert not differences(after, contents(fresh, again))
    assert ("model", "decoder.layers.1.attn.q_proj.weight") in differences(before, after)
    views.step(fresh, again)
    views.step(model, optimizer)
    assert not differences(contents(model, optimizer), contents(fresh, again))
    return model, optimizer, trained


def test_a_checkpoint_leaves_out_what_never_trains(tmp_path):
    model, optimizer, trained = left_out_runs(tmp_path, lambda model: model)
    stored = {n for n in stored_names(tmp_path / "step_2") if not n.startswith("optimizer.")}
    assert stored == {*get_fusion_params(model), *trained}
    frozen = {n for n, p in named_parameters(model) if not p.requires_grad}
    assert frozen
    assert not frozen & stored
    save_checkpoint(tmp_path / "whole", model, optimizer, step=2)
    assert frozen <= stored_names(tmp_path / "whole" / "step_2")

    other = make(5, train=False)
    refused(
        tmp_path,
        other,
        None,
        "pretrained tensors differ from those that this was trained over",
        "decoder.layers.0.attn.q_proj.weight is float32 [18, 18] in the saved base",
    )
    less = make(3, train=False)
    del less.encoder.layers[0].bias
    refused(
        tmp_path, less, None, "encoder.layers.0.bias is float32 [11] in the saved base, missing here"
    )
    half = make(3, train=False).bfloat16()
    refused(tmp_path, half, None, "dtype: decoder.layers.1.attn.q_proj.weight is [18, 18] torch.float32")

    with pytest.raises(ValueError, match="nothing was written") as caught:
        save_checkpoint(tmp_path, model, optimizer, step=3, trained=["decoder.norm.scale", "nose"])
    assert "trained names nose, which is no parameter of the model" in str(caught.value)
    assert "decoder.layers.1.attn.q_proj.weight trains, or is in the optimizer" in str(caught.value)
    assert "decoder.norm.scale trains" not in str(caught.value)
    assert latest_checkpoint(tmp_path).name == "step_2"


def test_a_parameter_with_two_names_is_left_out_under_both(tmp_path):
    def tied(scale):
        torch.manual_seed(5)
        model = nn.ModuleDict({"body": nn.Linear(3, 3), "table": nn.Linear(3, 7, bias=False)})
        model["head"] = nn.Linear(3, 7, bias=False)
        model["head"].weight = model["table"].weight
        torch.nn.init.constant_(model["body"].weight, scale)
        return model

    model = tied(2.0)
    save_checkpoint(tmp_path, model.requires_grad_(False), step=0, trained=["body.weight"])
    assert stored_names(tmp_path / "step_0") == {"body.weight"}
    fresh = tied(1.0)
    load_checkpoint(tmp_path, fresh)
    assert not differences(contents(model), contents(fresh))
    with torch.no_grad():
        fresh["head"].weight.add_(1)
    refused(tmp_path, fresh, None, "base: head.weight is", "base: table.weight is")


# --- what does not fit ---------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_left_alone(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, step=1)
    other = make(5, train=False, vocab_size=41)
    other.extra = nn.Linear(2, 2)
    other.encoder.half()
    del other.layers[0].attn.q_proj
    refused(
        tmp_path,
        other,
        None,
        "missing: extra.weight",
        "unexpected: decoder.layers.0.attn.q_proj.weight",
        "shape: decoder.tok_embeddings.weight is [37, 18] torch.float32, the model's is [41, 18]",
        "dtype: encoder.layers.0.weight is [11, 5] torch.float32, the model's is [11, 5] torch.float16",
    )
    with torch.device("meta"):
        empty = make()
    with pytest.raises(ValueError, match="is on the meta device: give it memory"):
        load_checkpoint(tmp_path, empty)
    with pytest.raises(ValueError, match="is no checkpoint of save_checkpoint, and contains none"):
        load_checkpoint(tmp_path / "nowhere", model)


def test_an_optimizer_that_does_not_fit_is_left_alone(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "both", model, optimizer, step=1)
    save_checkpoint(tmp_path / "model", model, step=1)
    fresh = make(5, train=False)
    refused(
        tmp_path / "both",
        fresh,
        adamw(fresh),
        "optimizer, unexpected: decoder.norm.scale",
        "load the model alone, build the optimizer again",
    )
    everything = torch.optim.AdamW(fresh.parameters())
    refused(tmp_path / "both", fresh, everything, "optimizer, missing: encoder.layers.0.weight")
    fresh, again = trained(5)
    refused(tmp_path / "model", fresh, again, "optimizer: none was saved; load the model alone")
    sgd = torch.optim.SGD(param_groups(fresh, lr=1.0))
    refused(tmp_path / "both", fresh, sgd, "AdamW was saved, this is SGD")
    joined = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad])
    refused(tmp_path / "both", fresh, joined, "divided into other groups")
    stray = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="holds 1 parameters that are not the model's"):
        load_checkpoint(tmp_path / "both", fresh, stray)


def test_checkpoints_are_removed_but_for_the_newest_and_those_to_keep(tmp_path):
    for step in (2, 3, 5, 11):
        save_checkpoint(tmp_path, nn.Linear(3, 5), step=step)
    with pytest.raises(ConfigError, match="^keep_last must be at least 1, got 0"):
        remove_checkpoints(tmp_path, keep_last=0)
    removed = remove_checkpoints(tmp_path, keep_last=2, keep=[2, 7])
    assert [path.name for path in removed] == ["step_3"]
    assert {path.name for path in tmp_path.glob("*step*")} == {"step_2", "step_5", "step_11"}
