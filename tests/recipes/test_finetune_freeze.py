"""Stages of a configuration: applied, recorded, and refused before the first step."""

import pytest
import torch
import yaml
from programs import DIGITS, run_program
from safetensors.torch import load_file
from torchfuse.recipes import finetune

from torchfuse.params import canonical_freeze_meta, read_freeze_meta
from torchfuse.tasks.runs import build_model, load_run

STAGES = [
    {
        "start_step": 0,
        "specs": [{"module": "*", "frozen": True}, {"module": "encoder.layers.1", "frozen": False}],
    },
    {
        "start_step": 1,
        "specs": [
            {"module": "encoder", "frozen": True},
            {"module": "fusion", "frozen": False},
        ],
    },
]


@pytest.fixture
def start(digits, tmp_path, monkeypatch):
    """Run the recipe for two steps with stages."""

    def start(stages):
        config = yaml.safe_load((DIGITS / "cross_attention.yaml").read_text())
        config |= {"freeze": stages, "output_dir": str(tmp_path / "run")}
        config["train"] |= {"max_steps": 2, "epochs": 1, "batch_size": 8, "warmup_steps": 0}
        config["data"]["test"] = None
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        run_program(finetune, digits.parent, "--config", tmp_path / "config.yaml")
        monkeypatch.chdir(digits.parent)  # the run's configuration holds relative paths
        return config, tmp_path / "run"

    return start


def test_stages_are_applied_and_recorded_and_what_they_trained_is_saved(start):
    config, output = start(STAGES)
    written = yaml.safe_load((output / "config.yaml").read_text())
    assert written["freeze"] == STAGES == canonical_freeze_meta(read_freeze_meta(written["freeze"]))
    trained = load_file(output / "fusion" / "trained.safetensors")
    assert {name.rsplit("layers.1.")[0] for name in trained} == {"encoder."}
    fresh = build_model(config["model"], config["pretrained"], device="cpu", dtype="fp32")
    model, _ = load_run(output, device="cpu", dtype="fp32")
    before, after = fresh.state_dict(), model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {n for n in moved if n.startswith("encoder.")} == set(trained)
    assert {n for n in moved if n.startswith("decoder.layers.")} <= {
        n for n in moved if "fusion_layer" in n
    }
    # The second stage was applied, and its parameters are in the optimizer.
    assert any(n.endswith("_scale.scale") for n in moved)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"start_step": 0}], "stage 0 must have the keys start_step and specs"),
        (
            [{"start_step": 900, "specs": [{"module": "encodr", "frozen": False}]}],
            "stage at step 900: 'encodr' matches no parameter; the model has decoder, encoder, fusion",
        ),
        (
            [{"start_step": 0, "specs": [{"module": "*", "frozen": True}]}],
            "Nothing trains from step 0 on",
        ),
    ],
    ids=["keys", "no-match", "nothing-trains"],
)
def test_stages_that_do_not_fit_are_refused_before_the_first_step(
    start, tmp_path, capsys, stages, message
):
    with pytest.raises(SystemExit, match="1"):
        start(stages)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
