"""The wheel holds the package, recipes and YAMLs, and nothing that would land on torchtune's files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["torchfuse", "torchfuse_torchao.py", "recipes", "pyproject.toml", "README.md", "LICENSE"]


@pytest.mark.long
def test_wheel(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.split():
        if name.split("/")[0] in SOURCES:
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "src" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        "..",
    ]
    subprocess.run(command, cwd=tmp_path / "src", check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "torchfuse",
        "torchfuse_torchao.py",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    expected = {
        f"torchfuse/{p.relative_to(ROOT / 'torchfuse')}" for p in (ROOT / "torchfuse").rglob("*.py")
    }
    expected |= {
        f"torchfuse/recipes/{p.relative_to(ROOT / 'recipes')}" for p in (ROOT / "recipes").rglob("*.py")
    }
    expected |= {
        f"torchfuse/recipes/{p.relative_to(ROOT / 'recipes')}"
        for p in (ROOT / "recipes").rglob("*.yaml")
    }
    assert expected <= names
    assert "torchfuse/py.typed" in names
