"""Mistakes in how a run trains, starts and resumes: each is one sentence, and nothing is written or changed."""

import json
import shutil

import pytest
from own_data import error_of_run, make_folder, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("mistakes"))
    (folder / "empty").mkdir()
    run(folder, folder, arch="joint_decoder", output_dir=str(folder / "run"))
    return folder


@pytest.fixture
def message(folder, tmp_path, monkeypatch, capfd):
    """What a run prints as its error, by changes of a configuration that is right."""

    def message(output=tmp_path / "run", **changes):
        before = _content(output)
        options = {"output_dir": str(output)} | changes
        error = error_of_run(folder, monkeypatch, capfd, **options)
        assert _content(output) == before
        return error

    return message


def _content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _optimizer(**section):
    return {"train": {"optimizer": section}}


MISTAKES = {
    "schedule": ({"train": {"lr_schedule": "cosin"}}, "must be one of constant, cosine, linear"),
    "no_optimizer": (_optimizer(_component_="torch.optim.AdanW"), "no component 'torch.optim.AdanW'"),
    "optimizer_lr": (_optimizer(lr=0.1), "train.optimizer has lr: give train.lr"),
    "not_an_optimizer": (_optimizer(_component_="builtins.list"), "must return a Optimizer"),
    "optimizer_option": (
        _optimizer(_component_="torch.optim.AdamW", beta=0.9),
        "unknown option 'beta'",
    ),
    "optimizer_in_backward": (
        {"train": {"optimizer_in_backward": True}},
        "needs train.clip_grad_norm=null",
    ),
    "label_smoothing": ({"train": {"label_smoothing": 2.0}}, "label_smoothing=2.0 must be at most 1"),
    "layer_decay": ({"train": {"lr_layer_decay": 0.0}}, "must be above 0 and at most 1"),
    "z_loss": ({"train": {"z_loss": -1.0}}, "train.z_loss=-1.0 must be at least 0"),
    "max_skipped": ({"train": {"max_skipped_steps": -1}}, "max_skipped_steps=-1 must be at least 0"),
    "lr_of_a_part": ({"train": {"lr": {"fusoin": 1e-3}}}, "unknown: fusoin; missing: fusion"),
    "negative_lr": ({"train": {"lr": -1.0}}, "train.lr=-1.0 must be a number of at least 0"),
    "accumulation": ({"train": {"gradient_accumulation_steps": 0}}, "must be at least 1"),
    "keep_last": ({"keep_last": 0}, "keep_last=0 must be at least 1"),
    "keep_best": ({"keep_best": True}, "needs keep_last, save_every and eval_every"),
    "log_every": ({"log_every": 0}, "log_every=0 must be at least 1"),
    "logger": ({"logger": {"_component_": "collections.Counter"}}, "must be a metric logger"),
    "no_logger": ({"logger": {"_component_": "torchtune.DiskLoger"}}, "no component"),
    "offloading": ({"activation_offloading": True}, "needs device=cuda, got device=cpu"),
    "tensor_parallel": ({"parallel": {"tensor": 2}}, "is not implemented; use parallel.strategy=fsdp"),
    "ranks": ({"parallel": {"shard": 4}}, "parallel.shard=4 must divide the number of ranks, 1"),
    "device": ({"device": "gpu"}, "'gpu' is not a device"),
    "dtype": ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
    "model_dtype": ({"model": {"dtype": "half"}}, "dtype"),
    "nothing_trains": ({"model": {"fusion_trainable": False}}, "No parameter trains"),
    "frozen_name": (
        {"freeze": [{"start_step": 0, "specs": [{"module": "decodre", "frozen": True}]}]},
        "decodre",
    ),
    "init_from_nothing": ({"init_from": "nothing"}, "init_from=nothing: there is no such folder"),
    "init_from_no_run": ({"init_from": "empty"}, "empty"),
    "init_from_other_arch": ({"init_from": "run"}, "The fusion tensors do not fit this model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_in_the_configuration(message, mistake):
    changes, expected = MISTAKES[mistake]
    assert expected in message(**changes)


def test_a_device_that_is_not_there(message):
    assert "device 'mps' is not available on this machine" in message(device="mps")


RESUMED = {
    "seed": ({"seed": 9}, "seed was 0 and is 9"),
    "learning_rate": ({"train": {"lr": 0.5}}, "train.lr was 0.001 and is 0.5"),
    "optimizer": (_optimizer(_component_="torch.optim.SGD"), "train.optimizer._component_ was"),
    "batch_size": ({"train": {"batch_size": 4}}, "questions a step was 3 and is 4"),
    "shorter": ({"train": {"max_steps": 1}}, "is of step 2, and the run has 1 steps"),
    "without_resume": ({"resume": False}, "is of an earlier run: resume it with resume=true"),
    "architecture": (
        {"arch": "joint_decoder"},
        "model.arch was 'cross_attention' and is 'joint_decoder'",
    ),
}


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("saved") / "run"
    run(folder, output.parent, save_every=1)
    return output


@pytest.mark.parametrize("mistake", RESUMED)
def test_on_resuming(message, saved, mistake):
    changes, expected = RESUMED[mistake]
    assert expected in message(saved, **{"save_every": 1, "resume": True} | changes)


def test_a_checkpoint_that_is_damaged(message, saved, tmp_path):
    output = shutil.copytree(saved, tmp_path / "damaged")
    file = next((output / "checkpoints" / "step_2").glob("*.json"))
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described)[:-9])
    assert "step_2" in message(output, save_every=1, resume=True)
