import shutil

import pytest
import torch
from hf import clip_tower, llama


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Directories of a Llama and of a CLIP tower, which tests must not change."""
    root = tmp_path_factory.mktemp("pretrained")
    llama(root / "llama")
    clip_tower(root / "clip")
    return {"decoder": root / "llama", "encoder": root / "clip"}


@pytest.fixture
def folders(pretrained, tmp_path):
    """Copies of these directories."""
    return {part: shutil.copytree(folder, tmp_path / folder.name) for part, folder in pretrained.items()}


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
