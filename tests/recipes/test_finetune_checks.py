"""What finetune and prepare_digits refuse before they do anything."""

import sys

import pytest
from torchfuse.recipes import finetune_checks, finetune_config, prepare_digits

from torchfuse.errors import ConfigError


def config(**train):
    limit = train.pop("limit", None)
    options = {
        name: train.pop(name) for name in ("eval_every", "eval_limit", "save_every") if name in train
    }
    return finetune_config.Config(
        train=finetune_config.Train(**train),
        data=finetune_config.Data(limit=limit),
        pretrained=finetune_config.Pretrained(path="model"),
        eval_batch_size=train.get("batch_size", 1),
        **options,
    )


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ({"max_steps": 0}, ["train.max_steps=0 must be at least 1"]),
        (
            {"epochs": 0, "gradient_accumulation_steps": -1, "warmup_steps": -2},
            ["train.epochs=0", "train.gradient_accumulation_steps=-1", "train.warmup_steps=-2"],
        ),
        ({"batch_size": 0}, ["train.batch_size=0", "eval_batch_size=0"]),
        ({"limit": 0}, ["data.limit=0"]),
        (
            {"eval_every": 0, "eval_limit": -3, "save_every": 0},
            ["eval_every=0", "eval_limit=-3 must be at least 1", "save_every=0"],
        ),
        ({"clip_grad_norm": 0.0}, ["train.clip_grad_norm=0.0 must be above 0, or null"]),
        ({"clip_grad_norm": float("nan")}, ["train.clip_grad_norm=nan"]),
        ({"lr": -1.0}, ["train.lr=-1.0 must be a number of at least 0"]),
        ({"lr": "fast"}, ["train.lr=fast"]),
        ({"lr": {}}, ["train.lr={}"]),
        ({"lr": {"fusion": "fast"}, "weight_decay": None}, ["train.lr=", "train.weight_decay=None"]),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_one_error(given, messages):
    with pytest.raises(ConfigError, match="must be") as info:
        finetune_checks.check_config(config(**given))
    for message in messages:
        assert message in str(info.value)


@pytest.mark.parametrize("given", [{}, {"decoder": "llama"}, {"encoder": "clip"}], ids=str)
def test_missing_checkpoints_are_named(given):
    incomplete = finetune_config.Config(pretrained=finetune_config.Pretrained(**given))
    name = "encoder" if "decoder" in given else "decoder"
    with pytest.raises(ConfigError, match=rf"'pretrained\.{name}': missing.* give pretrained\.path"):
        finetune_checks.check_config(incomplete)


def test_numbers_in_range():
    finetune_checks.check_config(config())
    finetune_checks.check_config(
        config(lr={"fusion": 1, "decoder": 0.5}, clip_grad_norm=None, max_steps=3)
    )


@pytest.mark.parametrize("part", ["images", "questions", "llama", "clip", "prompt.yaml"])
def test_prepare_digits_replaces_only_what_it_made(tmp_path, monkeypatch, part):
    mine = tmp_path / part
    mine.mkdir()
    (mine / "holiday.png").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["prepare_digits", str(tmp_path)])
    with pytest.raises(SystemExit, match=rf"holds {part} that this program did not make"):
        prepare_digits.main()
    assert (mine / "holiday.png").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [part]


def test_prepare_digits_needs_a_folder(tmp_path, monkeypatch):
    file = tmp_path / "demo"
    file.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["prepare_digits", str(file)])
    with pytest.raises(SystemExit, match="demo is a file; name a folder"):
        prepare_digits.main()


def test_prepare_digits_accepts_a_folder_that_it_made(digits):
    prepare_digits._check_folder(digits)
