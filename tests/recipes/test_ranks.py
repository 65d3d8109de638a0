"""Two ranks train on packs, some without images, as one process does on the same rows."""

import json

import pytest
import yaml
from own_data import configuration, make_folder
from programs import run_program, run_program_on_ranks
from torchfuse.recipes import finetune

from torchfuse.data import LoaderOptions, StepLoader, read_samples
from torchfuse.tasks.runs import build_model
from torchfuse.tasks.transforms import make_transform

STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of which few have an image, so that some packs have none."""
    folder = make_folder(tmp_path_factory.mktemp("ranks"))
    records = json.loads((folder / "llava.json").read_text())
    few = [record for number, record in enumerate(records) if number % 4 == 2 or number % 12 == 0]
    (folder / "few.json").write_text(json.dumps(few * 2))
    return folder


def ranks_with_images(folder, config):
    """For each step, which of two ranks have images."""
    given = yaml.safe_load(config.read_text())
    model = build_model(given["model"], {}, device="cpu", dtype="fp32")
    data = given["data"]
    samples = read_samples(data["train"][0]["path"], image_root=folder / "pictures")
    options = LoaderOptions(
        packed=True, max_seq_len=data["max_seq_len"], max_steps=STEPS, seed=given["seed"]
    )
    loaders = [
        StepLoader(samples, make_transform(model, given), options, world_size=2, rank=rank)
        for rank in (0, 1)
    ]
    steps = zip(*(loader.steps() for loader in loaders), range(STEPS), strict=False)
    return [tuple("encoder_input" in batch for [batch], _ in pair) for *pair, _ in steps]


@pytest.mark.distributed
@pytest.mark.parametrize("arch", ["cross_attention", "joint_decoder"])
def test_packs_on_two_ranks(folder, tmp_path, arch):
    rows = [{"path": str(folder / "few.json"), "image_root": str(folder / "pictures")}]
    losses = {}
    for name, size, program in (("one", 2, run_program), ("two", 1, run_program_on_ranks)):
        config = configuration(
            folder,
            arch,
            output_dir=str(tmp_path / name),
            model={"on_missing": "participate"},
            data={"train": rows, "packed": True, "max_seq_len": 110},
            train={"batch_size": size, "max_steps": STEPS, "epochs": 3, "lr": 0.1},
            seed=3,
        )
        program(finetune, folder, "--config", config)
        given = json.loads((tmp_path / name / "losses.json").read_text())
        losses[name] = [loss for _, loss in given]
    shown = ranks_with_images(folder, config)
    assert (True, False) in shown
    assert (False, False) in shown
    assert len(losses["one"]) == STEPS
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-5)
