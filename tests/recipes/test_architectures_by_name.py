"""``model.arch`` on the command line: any registered architecture, with its own options only."""

import json

import pytest
from greeting import ARCH, GreetingStrategy, register
from programs import digits_config, run_program
from torchfuse.recipes import finetune

from torchfuse.models import strategy
from torchfuse.tasks.runs import load_run

SHORT = ["train.max_steps=2", "train.batch_size=8", "train.warmup_steps=0", "data.test=null"]


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Run the recipe for two steps with overrides."""

    def start(config, *overrides):
        changes = [f"output_dir={tmp_path / 'run'}", *SHORT, *overrides]
        run_program(finetune, digits.parent, *digits_config(config, *changes))
        monkeypatch.chdir(digits.parent)  # the run's configuration holds relative paths
        return tmp_path / "run"

    return start


def test_a_fifth_architecture_is_finetuned_and_answers(start, monkeypatch):
    register(monkeypatch)
    output = start("cross_attention", f"model.arch={ARCH}", "model.every=null", "model.scale=2.0")
    model, transform = load_run(output, device="cpu", dtype="fp32")
    assert model.strategy == GreetingStrategy(2.0)
    losses = json.loads((output / "losses.json").read_text())
    assert len(losses) == 2
    assert transform.image_token == 40


def test_an_architecture_on_the_command_line_gets_its_own_options(start):
    output = start("cross_attention", "model.arch=mot", "model.placement=prefix")
    described = json.loads((output / "fusion" / "fusion.json").read_text())
    own = {f.name for f in strategy._REGISTRY["mot"].__dataclass_fields__.values()}
    assert described["architecture"] == "mot"
    assert set(described["options"]) <= own
    assert described["options"]["placement"] == "prefix"


def test_options_of_another_architecture_are_refused(start, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        start("joint_decoder", "model.arch=cross_attention")
    printed = capsys.readouterr().err
    assert (
        "architecture 'cross_attention': unknown option 'placement', unknown option 'encoder_" in printed
    )
    assert "it takes layers, num_heads, " in printed
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="1"):
        start("joint_decoder", "model.arch=crossattention")
    assert (
        "Unknown architecture 'crossattention'; there are cross_attention, " in capsys.readouterr().err
    )
