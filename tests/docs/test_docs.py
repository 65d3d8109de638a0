"""The code in README and docs runs, and the files, commands and links in them exist."""

import contextlib
import importlib
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from test_layers import LAYERS
from test_public_surface import reference
from torchfuse.recipes.finetune_config import Config

from torchfuse.training.config import typed

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ["configuration.md"]  # by docs/configuration.py, when the site is built
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run_in_order_and_print_what_the_page_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = {}, ""
    with torch.random.fork_rng(), warnings.catch_warnings():
        for kind, text in BLOCK.findall(page.read_text()):
            if kind == "python":
                output = io.StringIO()
                with contextlib.redirect_stdout(output):
                    exec(compile(text, name_of(page), "exec"), namespace)
                printed += output.getvalue()
            elif kind == "text" and printed:
                assert text in printed


@pytest.mark.parametrize("page", ["devices.md", "finetuning.md", "lora.md", "runs.md"])
def test_yaml_blocks_have_keys_of_the_finetune_recipe(page):
    given = [yaml.safe_load(text) for text in blocks(ROOT / "docs" / page, "yaml")]
    sections = [content for content in given if isinstance(content, dict)]
    assert sections
    required = {"output_dir": "run", "model": {}, "data": {"train": "train.jsonl"}}
    for section in sections:
        typed(OmegaConf.merge(required, section), Config)


def test_the_table_of_layers_is_complete():
    """The list in CONTRIBUTING.md is the order that the test of imports uses."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert named == [layer for layer in LAYERS if not layer.startswith("_")]


def test_pages_with_code_are_found():
    with_code = {page.name for page in PAGES if blocks(page, "python")}
    assert {"README.md", "quickstart.md", "names.md", "masks.md", "fusion_parameters.md"} <= with_code


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_exists(page):
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = page.read_text()
    shell = "\n".join(blocks(page, "bash"))
    made = re.findall(r"^make ([\w-]+)", shell, re.MULTILINE) + re.findall(r"`make ([\w-]+)`", text)
    assert set(made) <= set(targets)
    for path in re.findall(r"recipes/configs/[\w/]+\.yaml", text):
        assert (ROOT / path).is_file(), path
    for recipe in re.findall(r"torchfuse/recipes/(\w+\.py)|torchfuse\.recipes\.(\w+) ", text):
        file = recipe[0] or f"{recipe[1]}.py"
        assert (ROOT / "recipes" / file).is_file(), file
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists() or link in GENERATED, link


def test_the_site_builds_and_contains_every_public_name(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name: path for path in (tmp_path / "reference").glob("*/index.html")}
    assert set(pages) == set(reference().PUBLIC_MODULES)
    documented, public = set(), set()
    for module, page in pages.items():
        names = importlib.import_module(module).__all__
        shown = set(re.findall(rf'id="{re.escape(module)}\.(\w+)"', page.read_text()))
        assert shown == set(reference().documented_names(module)), module
        public |= {id(getattr(importlib.import_module(module), name)) for name in names}
        documented |= {id(getattr(importlib.import_module(module), name)) for name in shown}
    assert documented == public
