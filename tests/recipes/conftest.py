import json

import pytest
from answered_run import make_run
from programs import digits_config, run_program, tune
from torchfuse.recipes import prepare_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """What prepare_digits writes, with two steps of pretraining, question files cut short, and their images alone."""
    folder = tmp_path_factory.mktemp("digits") / "demo"
    run_program(prepare_digits, folder.parent, folder, "--llama-steps", 2, "--clip-steps", 2)
    shown = (folder / "prompt.yaml").read_text()
    for split, count in (("train", 64), ("test", 48)):
        file = folder / "questions" / f"{split}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        kinds = [json.loads(line)["kind"] for line in lines]
        assert set(kinds[:count]) == {"one_image", "two_images", "text"}
        text = [line for line, kind in zip(lines, kinds, strict=True) if kind == "text"]
        (folder / "questions" / f"{split}_text.jsonl").write_text("".join(text))
        file.write_text("".join(lines[:count]))
        shown += file.read_text()
    for image in (folder / "images").iterdir():
        if image.name not in shown:
            image.unlink()
    return folder


@pytest.fixture(scope="session")
def run_of(digits):
    """For an architecture, the folder of a run of two steps, and what the run printed."""
    runs = {}

    def run(arch):
        if arch not in runs:
            output = digits / f"run_{arch}"
            changes = [f"output_dir={output}", "train.max_steps=2", "train.batch_size=16"]
            config = digits_config(arch, *changes)
            printed = tune(digits.parent, "torchfuse/recipes/finetune.py", *config)
            runs[arch] = (output, printed)
        return runs[arch]

    return run


@pytest.fixture(scope="session")
def answered(tmp_path_factory):
    """The folder of a run, with files of samples of which it answers some right."""
    return make_run(tmp_path_factory.mktemp("answered"))
