"""The files that GitHub and pre-commit read: valid, and in agreement with the project's own."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import torchfuse

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_yaml_and_name_targets_of_the_makefile(file):
    assert isinstance(yaml.safe_load(file.read_text()), dict)
    targets = set(re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"run: make ([\w-]+)", file.read_text())) <= targets


def test_workflows_run_every_check_that_a_change_must_pass():
    run = {
        step.get("run", "")
        for name in ("test", "long")
        for step in steps(load(f".github/workflows/{name}.yml"))
    }
    assert run >= set(re.findall(r"^make .*", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)) | {
        "make docs"
    }


def test_the_matrix_covers_the_supported_versions():
    entries = load(".github/workflows/test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    pythons = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", c)}
    assert {entry["python"] for entry in entries} == pythons
    pins = " ".join(entry["with"] for entry in entries)
    for package in ("torch", "torchao"):
        (oldest,) = re.findall(
            rf"^{package}>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE
        )
        assert re.search(rf"\b{package}=={re.escape(oldest)}", pins)


def test_the_citation_is_of_this_version():
    citation = load("CITATION.cff")
    assert citation["version"] == torchfuse.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
