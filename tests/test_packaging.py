"""What a wheel contains, and that an installed wheel and a tree that is not installed both work."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import true_sizes

ROOT = Path(__file__).parents[1]
# Commands in one process, whose imports take longer than they do.
RUN_ALL = """
import json, sys
from torchfuse.cli.main import main as torchfuse
from torchtune._cli.tune import main as tune
programs = {"torchfuse": lambda: torchfuse(), "tune": tune}
for sys.argv in json.loads(sys.argv[1]):
    programs[sys.argv[0]]()
"""
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def copy_tracked_files(folder):
    """The source tree as a clone has it, with what is not committed yet."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    archive = subprocess.run(
        ["tar", "c", "--null", "--files-from=-"], cwd=ROOT, input=tracked.stdout, stdout=subprocess.PIPE
    )
    folder.mkdir()
    subprocess.run(["tar", "x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def python_without_torchfuse(folder, *paths):
    """A function that runs this Python with every installed package but torchfuse, and ``paths`` in front."""
    folder.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if "torchfuse" not in package.name:
            (folder / package.name).symlink_to(package)
    path = os.pathsep.join(map(str, [*paths, folder]))
    environment = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def run(*arguments, cwd):
        return subprocess.run(
            [sys.executable, "-S", *arguments],  # -S: only what PYTHONPATH names
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def tree(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git repository, for the list of its files")
    return copy_tracked_files(tmp_path / "tree")


def test_the_list_of_packages_is_complete():
    folders = {file.parent for file in (ROOT / "torchfuse").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETTINGS["packages"]) == packages | {"torchfuse.recipes"}


@pytest.mark.long
def test_a_wheel_holds_the_package_and_recipes_and_runs(tree, tmp_path):
    """It has no top-level package called recipes: torchtune installs one, and its files would be replaced."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path]
    subprocess.run([*pip, *build], cwd=tree, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"{wheel.name.split('-py3')[0]}.dist-info"
    modules = {f"{name}.py" for name in SETTINGS.get("py-modules", [])}
    assert {name.split("/")[0] for name in names} == {"torchfuse", metadata} | modules
    files = [*(tree / "torchfuse").rglob("*.py"), *(tree / "recipes").rglob("*.py")]
    files += [*(tree / "recipes").rglob("*.yaml"), tree / "torchfuse" / "py.typed"]
    expected = {file.relative_to(tree).as_posix() for file in files}
    assert {f"torchfuse/{name}" if name.startswith("recipes/") else name for name in expected} <= names

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    run = python_without_torchfuse(tmp_path / "packages", site)
    done = run("-m", "torchfuse", "--version", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in wheel.name
    options = ["torchfuse/recipes/finetune.py", "--config", "none.yaml"]
    done = run("-m", "torchtune._cli.tune", "run", *options, cwd=tmp_path)
    assert "error: none.yaml cannot be read" in done.stderr

    done = run("-m", "torchfuse", "ls", cwd=tmp_path)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(
        file.relative_to(ROOT / "recipes" / "configs").with_suffix("").as_posix()
        for file in (ROOT / "recipes" / "configs").rglob("*.yaml")
    )
    folder = true_sizes.make_folder(tmp_path / "true_sizes")
    commands = [["torchfuse", "cp", name, f"copies/{name}.yaml"] for name in names]
    for name in names:
        if not name.startswith("digits/"):
            options = ["torchfuse/recipes/finetune.py", "--config", name, *true_sizes.shrink(name)]
            commands.append(["tune", "run", *options])
    done = run("-c", RUN_ALL, json.dumps(commands), cwd=folder)
    for name in names:
        copied = (folder / "copies" / f"{name}.yaml").read_text()
        assert copied == (tree / "recipes" / "configs" / f"{name}.yaml").read_text()
        assert name.startswith("digits/") or f"saved runs/{name}/fusion" in done.stdout, done.stderr
    # No checkpoint has these sizes there: they are in the wheel.
    done = run("-m", "torchfuse", "describe", "llava/stage1", cwd=tmp_path)
    assert "8,030,261,248" in done.stdout, done.stderr


@pytest.mark.long
def test_a_tree_that_is_not_installed_works(tree, tmp_path):
    """Without entry points and metadata, as on a machine that cannot install it."""
    (tree / "torchfuse" / "recipes").symlink_to("../recipes")
    run = python_without_torchfuse(tmp_path / "packages", tree)
    done = run("-c", "import importlib.metadata as m; m.version('torchfuse')", cwd=tree)
    assert "PackageNotFoundError" in done.stderr
    done = run("-c", "import torchfuse; print(torchfuse.__version__, torchfuse.__file__)", cwd=tmp_path)
    assert str(tree) in done.stdout, done.stderr
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = run(
        "-m", "pytest", *options, "-m", "gpu", "--continue-on-collection-errors", "tests", cwd=tree
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" in done.stdout.splitlines()[-1]
    assert "error" not in done.stdout.splitlines()[-1]
    sizes = [
        "--size",
        "tiny",
        "--dtype",
        "fp32",
        "--rows",
        "1",
        "--prompt",
        "7",
        "--new",
        "3",
        "--rounds",
        "1",
    ]
    done = run("tests/benchmarks/decode.py", *sizes, "--device", "cpu", "--quantized", cwd=tree)
    assert done.returncode == 0, done.stderr
