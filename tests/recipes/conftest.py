import json
import sys

import pytest
import torch
from torchfuse.recipes import prepare_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """What prepare_digits makes, with hardly any training, and question files cut short."""
    folder = tmp_path_factory.mktemp("digits") / "demo"
    argv, sys.argv = sys.argv, ["prepare_digits", str(folder), "--llama-steps", "2", "--clip-steps", "2"]
    try:
        with torch.random.fork_rng():
            prepare_digits.main()
    finally:
        sys.argv = argv
    for split, count in (("train", 64), ("test", 48)):
        file = folder / "questions" / f"{split}.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        assert {json.loads(line)["kind"] for line in lines[:count]} == {
            "one_image",
            "two_images",
            "text",
        }
        (folder / "questions" / f"{split}_all.jsonl").write_text("".join(lines))
        file.write_text("".join(lines[:count]))
    return folder
