"""Mistakes in how a run is launched, trains, starts and resumes; docs/mistakes.md lists them.

Each is one sentence, ends the run where the table says, and nothing is written or changed.
"""

import contextlib
import io
import json
import pkgutil
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import DEFAULT, patch

import pytest
import yaml
from own_data import configuration, error_of_run, make_folder, run
from ranks import run_on_ranks
from torch import distributed
from torchfuse.recipes import finetune

PAGE = Path(__file__).parents[2] / "docs" / "mistakes.md"
BEGIN, END = "<!-- mistakes -->\n", "<!-- /mistakes -->"
READ, BUILT, TRAINED = "the data is read", "the model is built", "the first step"
STAGES = {
    READ: "torchfuse.recipes.finetune.read_data",
    BUILT: "torchfuse.recipes.finetune_run.build_run_model",
    TRAINED: "torchfuse.recipes.finetune_trainer.Trainer.train",
}
LAUNCH = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class Mistake(NamedTuple):
    """A change of a run that is right.

    Attributes:
        before: what is not reached.
        error: a part of the message.
        changes: keys of the configuration.
        arguments: more of the command line.
        environment: variables of the environment.
    """

    before: str
    error: str
    changes: dict[str, Any] = {}
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = {}

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.environment.items() if name not in LAUNCH]
        return " ".join([*variables, *self.arguments, *map("=".join, keys(self.changes))])


def keys(section, prefix=""):
    """The keys of nested sections with their values, as on a command line."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield (
                prefix + name,
                yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip(),
            )


def optimizer(**section):
    return {"train": {"optimizer": section}}


def train(**keys):
    return {"train": keys}


def decoder_lora(**keys):
    return {"lora": {"decoder": keys}}


MISTAKES = {
    "launch": [
        Mistake(READ, "neither a file nor the name of an inst", arguments=("--config", "llava/stage9")),
        Mistake(READ, "none.yaml cannot be read (No such file", arguments=("--config", "none.yaml")),
        Mistake(READ, "Override train.lr: expected key=value", arguments=("train.lr",)),
        Mistake(READ, "'train.lrate': unknown; there are lr,", arguments=("train.lrate=1e-3",)),
        Mistake(READ, "'train.lr_layer_decay': Value 'x'", arguments=("train.lr_layer_decay=x",)),
        Mistake(
            READ,
            "RANK is not set, LOCAL_RANK is not set, MASTER_PORT is not set, MASTER_ADDR is not set",
            environment={"WORLD_SIZE": "2"},
        ),
        Mistake(READ, "WORLD_SIZE is two", environment={**LAUNCH, "WORLD_SIZE": "two"}),
        Mistake(
            READ, "RANK is 2 of WORLD_SIZE 2", environment={**LAUNCH, "WORLD_SIZE": "2", "RANK": "2"}
        ),
        Mistake(READ, "parallel.shard=4 must divide the number of ranks, 1", {"parallel": {"shard": 4}}),
        Mistake(READ, "not implemented; use parallel.strategy=fsdp", {"parallel": {"tensor": 2}}),
        Mistake(READ, "not implemented; use activation_checkpointing", {"parallel": {"context": 2}}),
        Mistake(
            READ,
            "device=mps has no communication between processes; run one process",
            {"device": "mps"},
            environment={**LAUNCH, "WORLD_SIZE": "2"},
        ),
    ],
    "configuration": [
        Mistake(TRAINED, "are too few for one step of 1 x 400 x 1 rows", train(batch_size=400)),
        Mistake(TRAINED, "must be one of constant, cosine, linear", train(lr_schedule="cosin")),
        Mistake(TRAINED, "no component 'torch.optim.AdanW'", optimizer(_component_="torch.optim.AdanW")),
        Mistake(READ, "train.optimizer has lr: give train.lr", optimizer(lr=0.1)),
        Mistake(TRAINED, "must return a Optimizer", optimizer(_component_="builtins.list")),
        Mistake(TRAINED, "unknown option 'beta'", optimizer(_component_="torch.optim.AdamW", beta=0.9)),
        Mistake(READ, "needs train.clip_grad_norm=null", train(optimizer_in_backward=True)),
        Mistake(READ, "gradients before they are clipped", optimizer(_component_="CPUOffloadOptimizer")),
        Mistake(READ, "label_smoothing=2.0 must be at most 1", train(label_smoothing=2.0)),
        Mistake(READ, "must be above 0 and at most 1", train(lr_layer_decay=0.0)),
        Mistake(READ, "train.z_loss=-1.0 must be at least 0", train(z_loss=-1.0)),
        Mistake(READ, "max_skipped_steps=-1 must be at least 0", train(max_skipped_steps=-1)),
        Mistake(TRAINED, "unknown: fusoin; missing: fusion", train(lr={"fusoin": 1e-3})),
        Mistake(READ, "train.lr=-1.0 must be a number of at least 0", train(lr=-1.0)),
        Mistake(READ, "must be at least 1", train(gradient_accumulation_steps=0)),
        Mistake(READ, "keep_last=0 must be at least 1", {"keep_last": 0}),
        Mistake(READ, "needs keep_last, save_every and eval_every", {"keep_best": True}),
        Mistake(READ, "log_every=0 must be at least 1", {"log_every": 0}),
        Mistake(TRAINED, "must be a metric logger", {"logger": {"_component_": "collections.Counter"}}),
        Mistake(TRAINED, "no component", {"logger": {"_component_": "torchtune.DiskLoger"}}),
        Mistake(
            TRAINED,
            "WandBLogger) cannot be started: ImportError: ``wandb`` package not found",
            {"logger": {"_component_": "torchtune.training.metric_logging.WandBLogger"}},
        ),
        Mistake(TRAINED, "No parameter trains", {"model": {"fusion_trainable": False}}),
        Mistake(
            TRAINED,
            "decodre",
            {"freeze": [{"start_step": 0, "specs": [{"module": "decodre", "frozen": True}]}]},
        ),
    ],
    "device": [
        Mistake(TRAINED, "'gpu' is not a device", {"device": "gpu"}),
        Mistake(TRAINED, "device 'mps' is not available on this machine", {"device": "mps"}),
        Mistake(TRAINED, "dtype must be one of fp32, bf16, got 'fp16'", {"dtype": "fp16"}),
        Mistake(TRAINED, "dtype", {"model": {"dtype": "half"}}),
        Mistake(READ, "needs device=cuda, got device=cpu", {"activation_offloading": True}),
    ],
    "adapter": [
        Mistake(TRAINED, "mlp_3layer", {"model": {"adapter": "mlp_3layer"}}),
        Mistake(READ, "lora.decoder", decoder_lora(rank=0)),
        Mistake(READ, "lora.decoder.rank must be given with lora.decoder.alpha", decoder_lora(alpha=8)),
        Mistake(READ, "dropout", decoder_lora(rank=2, dropout=1.5)),
        Mistake(TRAINED, "q_porj", decoder_lora(rank=2, targets=["q_porj"])),
        Mistake(TRAINED, "quantize", {"lora": {"fusion": {"rank": 2, "quantize_base": True}}}),
        Mistake(TRAINED, "init_from=nothing: there is no such folder", {"init_from": "nothing"}),
        Mistake(TRAINED, "init_from=empty must be the folder of a run that has", {"init_from": "empty"}),
        Mistake(TRAINED, "a whole model is pretrained.path", {"init_from": "llama"}),
        Mistake(READ, "init_from=run would be written", {"init_from": "run", "output_dir": "run"}),
        Mistake(TRAINED, "this run starts from itself", {"init_from": "itself"}),
        Mistake(TRAINED, "The fusion tensors do not fit this model", {"init_from": "run"}),
    ],
    "resume": [
        Mistake(TRAINED, "seed was 0 and is 9", {"seed": 9}),
        Mistake(TRAINED, "train.lr was 0.001 and is 0.5", train(lr=0.5)),
        Mistake(TRAINED, "train.lr_schedule was 'cosine' and is 'linear'", train(lr_schedule="linear")),
        Mistake(TRAINED, "train.optimizer._component_ was", optimizer(_component_="torch.optim.SGD")),
        Mistake(TRAINED, "questions a step was 3 and is 4", train(batch_size=4)),
        Mistake(TRAINED, "is of step 2, and the run has 1 steps", train(max_steps=1)),
        Mistake(BUILT, "is of an earlier run: resume it with resume=true", {"resume": False}),
        Mistake(
            TRAINED, "model.arch was 'cross_attention' and is 'joint_dec", {"arch": "joint_decoder"}
        ),
    ],
}
CASES = [(kind, mistake) for kind, mistakes in MISTAKES.items() for mistake in mistakes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("mistakes"))
    (folder / "empty").mkdir()
    run(folder, folder, arch="joint_decoder", output_dir=str(folder / "run"))
    shutil.copytree(folder / "run", folder / "itself")
    file = folder / "itself" / "config.yaml"
    file.write_text(file.read_text().replace("init_from: null", f"init_from: {folder / 'itself'}"))
    return folder


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("saved") / "run"
    run(folder, output.parent, save_every=1)
    return output


@pytest.fixture
def check(folder, monkeypatch, capfd):
    """Make a mistake in a run that is right otherwise."""

    def check(mistake, output, **changes):
        before, reached = (content(folder), content(output)), []
        monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
        for name, value in mistake.environment.items():
            monkeypatch.setenv(name, value)
        for stage, path in STAGES.items():
            monkeypatch.setattr(path, noted(pkgutil.resolve_name(path), reached, stage))
        changes = {"output_dir": str(output)} | changes | mistake.changes
        error = error_of_run(folder, monkeypatch, capfd, *mistake.arguments, **changes)
        assert mistake.error in error
        assert (content(folder), content(output)) == before
        assert reached == list(STAGES)[: list(STAGES).index(mistake.before)]

    return check


def noted(function, reached, stage):
    """A function that notes when it is called."""

    def call(*args, **kwargs):
        reached.append(stage)
        return function(*args, **kwargs)

    return call


def content(folder):
    paths = (
        path for path in folder.rglob("*") if path != folder / "config.yaml"
    )  # the one with a mistake
    return {path: path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize(("kind", "mistake"), CASES, ids=[f"{kind}-{words}" for kind, words in CASES])
def test_a_mistake_is_one_sentence_and_nothing_is_written(kind, mistake, check, saved, tmp_path):
    if kind == "resume":
        check(mistake, saved, save_every=1, resume=True)
    else:
        check(mistake, tmp_path / "run")


def test_a_checkpoint_that_is_damaged(check, saved, tmp_path):
    output = shutil.copytree(saved, tmp_path / "damaged")
    file = next((output / "checkpoints" / "step_2").glob("*.json"))
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described)[:-9])
    check(Mistake(TRAINED, "step_2"), output, save_every=1, resume=True)


ON_RANKS = [
    ({"model": {}}, 'Several ranks need a model with on_missing="participate"'),
    ({"train": {"batch_size": 70}}, "are too few for one step of 2 x 70 x 1 rows"),
    ({"logger": {"_component_": "torchtune.DiskLoger"}}, "logger: there is no component"),
    ({"parallel": {"replicate": 4}}, "parallel.replicate=4 must divide the number of ranks, 2"),
]


def on_each_rank(rank, folder, output, files):
    environment = LAUNCH | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    for file, error in files:
        with (
            patch.multiple(distributed, init_process_group=DEFAULT),
            patch.dict("os.environ", environment),
            patch.object(sys, "argv", ["finetune", "--config", str(file)]),
            patch.object(sys, "path", [*sys.path]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as printed,
            pytest.raises(SystemExit, match="^1$"),
        ):
            finetune.main()
        assert error in printed.getvalue()
        assert not output.exists()


@pytest.mark.distributed
def test_every_rank_ends_with_the_same_sentence(folder, tmp_path):
    files, output = [], tmp_path / "run"
    for number, (changes, error) in enumerate(ON_RANKS):
        changes = {"output_dir": str(output), "model": {"on_missing": "participate"}} | changes
        files.append((configuration(folder, **changes).rename(tmp_path / f"{number}.yaml"), error))
    run_on_ranks(on_each_rank, folder, output, files)


def table():
    lines = ["| kind | mistake | message | ends before |", "|---|---|---|---|"]
    lines += [f"| {kind} | `{row}` | ... {row.error} ... | {row.before} |" for kind, row in CASES]
    return "\n".join(lines) + "\n"


def test_the_table_of_mistakes_is_what_is_tested():
    before, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, after = rest.partition(END)
    if shown.strip() != table().strip():
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")
        pytest.fail(f"{PAGE} was out of date and has been rewritten; look at it and commit it.")
