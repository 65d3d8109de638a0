"""The compare recipe on two architectures and a few steps: what it writes, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from programs import DIGITS, run_program
from torchfuse.recipes import compare, finetune, finetune_config

BUDGET = {
    "train": {"max_steps": 3, "batch_size": 16, "warmup_steps": 1},
    "eval_every": 2,
    "eval_limit": 5,
    "eval_batch_size": 48,
}


@pytest.fixture
def start(digits, tmp_path):
    def start(*configs, budget=BUDGET, **changes):
        given = {
            "output_dir": str(tmp_path / "runs"),
            "configs": [str(c) for c in configs],
            "budget": budget,
        }
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(given | changes))
        run_program(compare, digits.parent, "--config", tmp_path / "compare.yaml")

    return start


@pytest.fixture
def finetune_here(monkeypatch):
    """Runs of the finetune recipe in this process instead of one of their own."""

    def run(command):
        assert command[:3] == [sys.executable, "-m", "torchfuse.recipes.finetune"]
        run_program(finetune, Path.cwd(), *command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare.subprocess, "run", run)


@pytest.mark.usefixtures("finetune_here")
def test_two_architectures_are_trained_on_one_budget_and_drawn(start, tmp_path, capsys):
    start(DIGITS / "joint_decoder.yaml", DIGITS / "moma.yaml")
    printed = capsys.readouterr().out
    runs = {name: tmp_path / "runs" / name for name in ("joint_decoder", "moma")}
    numbers = json.loads((tmp_path / "runs.json").read_text())
    assert numbers["budget"] == BUDGET
    assert list(numbers["runs"]) == list(runs)
    for name, run in runs.items():
        metrics = json.loads((run / "metrics.json").read_text())
        assert numbers["runs"][name] == metrics
        assert [step for step, _ in metrics["accuracy_at_step"]] == [2, 3]
        written = yaml.safe_load((run / "config.yaml").read_text())
        assert written["train"]["max_steps"] == 3
        assert written["model"]["arch"] == name
        row = [f"{metrics['new_parameters']:,}", f"{metrics['training_seconds']:.0f} s"]
        row += [f"{metrics['tokens_per_second']:,}"]
        row += [f"{metrics['after'][kind]:.1%}" for kind in ("one_image", "two_images")]
        assert re.search(rf"^{name} +{' +'.join(map(re.escape, row))}$", printed, re.MULTILINE), printed
    tokens = [metrics["tokens"] for metrics in numbers["runs"].values()]
    assert tokens[0] == tokens[1]
    with Image.open(tmp_path / "runs.png") as image:
        assert min(image.size) > 500
        assert len(image.convert("L").getcolors()) > 100  # something is drawn


def metrics(name, ends, **changes):
    return {
        "before": {"text": 1.0},
        "after": {"one_image": ends, "text": 1.0, "all": ends},
        "accuracy_at_step": [[2, 0.25], [4, ends]],
        "new_parameters": 12345,
        "steps": 4,
        "training_seconds": 7.25,
        "tokens_per_second": 6789,
    } | changes


def test_the_table_leaves_out_what_text_alone_answers():
    table = compare.table({"a": metrics("a", 0.5), "longer": metrics("longer", 1.0, new_parameters=7)})
    assert table.splitlines() == [
        "architecture  new parameters  training  tokens/s  one image",
        "a                     12,345       7 s     6,789      50.0%",
        "longer                     7       7 s     6,789     100.0%",
    ]


def test_curves_and_rows_show_the_numbers(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "save_figure", lambda figure, path: drawn.append((figure, path)))
    compare.draw(tmp_path / "a.png", {"mot": metrics("mot", 0.5), "mine": metrics("mine", 0.75)})
    ((figure, path),) = drawn
    assert path == tmp_path / "a.png"
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {"mot": [[2, 0.25], [4, 0.5]], "mine": [[2, 0.25], [4, 0.75]]}
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    texts = {text.get_text(): text for text in figure.texts}
    assert texts["mine"].get_position()[1] > texts["mot"].get_position()[1]  # in the order of the ends
    assert all(texts[name].get_color() == color for name, color in colors.items())
    assert texts["75.0%"].get_position()[1] == texts["mine"].get_position()[1]
    assert texts["50.0%"].get_position()[1] == texts["mot"].get_position()[1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_accuracies_at_the_ends_of_the_scale_are_drawn_at_its_border(tmp_path, share):
    """Their odds are zero or infinite."""
    compare.draw(tmp_path / "a.png", {"mot": metrics("mot", share)})
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.convert("L").getcolors()) > 100


@pytest.mark.parametrize(
    ("configs", "changes", "messages"),
    [
        ([], {}, ["configs must list at least one configuration."]),
        (["nowhere.yaml"], {}, ["nowhere.yaml cannot be read (No such file or directory)"]),
        (["mot.yaml", "mot.yaml"], {}, ["mot.yaml: there is a run named mot already."]),
        (["mot.yaml"], {"budget": {}}, ["eval_every and data.test must be given"]),
        (
            ["mot.yaml", "moma.yaml"],
            {"budget": {"eval_every": 2, "train": {"max_stps": 2}}},
            [
                "mot.yaml: Configuration key 'train.max_stps': ",
                "moma.yaml: Configuration key 'train.max_stps': ",
            ],
        ),
        (["mot.yaml"], {"budget": {"eval_every": 0}}, ["mot.yaml: eval_every=0 must be at least 1"]),
        (["mot.yaml"], {"budgt": {}}, ["Configuration key 'budgt': unknown"]),
        (["evaluate.yaml"], {}, ["evaluate.yaml: Configuration key 'run': unknown"]),
    ],
    ids=[
        "none",
        "no-file",
        "twice",
        "nothing-to-draw",
        "unknown-key",
        "number",
        "own-key",
        "other-recipe",
    ],
)
def test_configurations_that_cannot_be_compared_are_refused_before_the_first_run(
    start, tmp_path, capsys, monkeypatch, configs, changes, messages
):
    monkeypatch.setattr(compare, "_finetune", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match="1"):
        start(*(DIGITS / name for name in configs), **changes)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    for message in messages:
        assert message in printed
    assert [path.name for path in tmp_path.iterdir()] == ["compare.yaml"]


def test_runs_on_other_data_or_budgets_cannot_be_compared(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "_finetune", lambda *_: pytest.fail("a run was started"))
    other = yaml.safe_load((DIGITS / "mot.yaml").read_text())
    other["data"]["limit"], other["train"]["epochs"], other["train"]["lr"] = 50, 2, 1e-5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(SystemExit, match="1"):
        start(DIGITS / "mot.yaml", tmp_path / "other.yaml")
    printed = capsys.readouterr().err
    assert (
        f"other.yaml: differs from {DIGITS / 'mot.yaml'} in data.limit, train.epochs; budget" in printed
    )


def test_a_run_that_fails_ends_the_comparison(start, tmp_path, capfd):
    """The run has a process of its own."""
    broken = yaml.safe_load((DIGITS / "mot.yaml").read_text())
    broken["pretrained"]["decoder"] = "demo/nowhere"
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(SystemExit, match="1"):
        start(tmp_path / "broken.yaml")
    printed = capfd.readouterr().err
    assert "demo/nowhere is not a directory" in printed
    assert "error: the run broken ended with exit code 1, see above." in printed
    assert not (tmp_path / "runs.json").exists()


def test_the_digits_configurations_differ_in_nothing_but_the_architecture():
    given = compare.typed(compare.read_config(DIGITS / "compare.yaml", ""), compare.Config)
    runs = compare._read_runs(given)
    assert set(runs) == {"joint_decoder", "cross_attention", "mot", "moma", "deepstack"}
    assert all(run.model.arch == name for name, run in runs.items())
    assert all(compare.typed(run, finetune_config.Config).eval_every for run in runs.values())
