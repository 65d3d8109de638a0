"""``model.arch`` on the command line: any registered architecture, with its own options only."""

import json
import sys
from pathlib import Path

import pytest
import torch
from greeting import ARCH, GreetingStrategy, register
from torchfuse.recipes import finetune

from torchfuse import recipes
from torchfuse.models import strategy
from torchfuse.tasks.runs import load_run

CONFIGS = Path(recipes.__file__).parent / "configs" / "digits"
SHORT = ["train.max_steps=2", "train.batch_size=8", "train.warmup_steps=0", "data.test=null"]


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Run the recipe for two steps with overrides."""

    def run(config, *overrides):
        argv = [
            "finetune",
            "--config",
            str(CONFIGS / f"{config}.yaml"),
            f"output_dir={tmp_path / 'run'}",
        ]
        monkeypatch.chdir(digits.parent)
        monkeypatch.setattr(sys, "argv", [*argv, *SHORT, *overrides])
        with torch.random.fork_rng():
            finetune.main()
        return tmp_path / "run"

    return run


def test_a_fifth_architecture_is_finetuned_and_answers(start, monkeypatch):
    register(monkeypatch)
    output = start("cross_attention", f"model.arch={ARCH}", "model.every=null", "model.scale=2.0")
    model, transform = load_run(output, device="cpu", dtype="fp32")
    assert model.strategy == GreetingStrategy(2.0)
    losses = json.loads((output / "losses.json").read_text())
    assert len(losses) == 2
    assert transform.image_token == 40


@pytest.mark.parametrize("arch", ["mot"])
def test_an_architecture_on_the_command_line_gets_its_own_configuration(start, arch):
    placement = ["model.placement=prefix"]
    output = start("cross_attention", f"model.arch={arch}", *placement)
    described = json.loads((output / "fusion" / "fusion.json").read_text())
    own = {f.name for f in strategy._REGISTRY[arch].__dataclass_fields__.values()}
    assert described["architecture"] == arch
    assert set(described["options"]) <= own
    assert described["options"]["placement"] == "prefix"


def test_defect_7_an_arch_on_the_command_line_kept_anothers_configuration(start, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        start("joint_decoder", "model.arch=cross_attention")
    said = capsys.readouterr().err
    assert "architecture 'cross_attention': unknown option 'placement', unknown option 'encoder_" in said
    assert "it takes layers, num_heads, " in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="1"):
        start("joint_decoder", "model.arch=crossattention")
    assert (
        "Unknown architecture 'crossattention'; there are cross_attention, " in capsys.readouterr().err
    )
