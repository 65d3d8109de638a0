"""Run recipes with a command line: in this process, on the ranks of a group, or in a process of their own."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
import torch
from ranks import run_on_ranks
from torch import distributed
from torchtune._cli import tune as tune_command

from torchfuse import recipes

CONFIGS = Path(recipes.__file__).parent / "configs"
DIGITS = CONFIGS / "digits"


def digits_config(name: str, *overrides: str) -> list[Any]:
    """The arguments that give a recipe one of the digits' configurations, and keys of it."""
    return ["--config", DIGITS / f"{name}.yaml", *overrides]


@contextlib.contextmanager
def _command_line(folder: Path, *arguments: Any):
    """This process as one that was started in a folder with some arguments."""
    with pytest.MonkeyPatch.context() as monkeypatch, torch.random.fork_rng():
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        yield


def tune(folder: Path, *arguments: Any) -> str:
    """``tune run`` with these arguments, in this process; returns what is printed."""
    with (
        _command_line(folder, "tune", "run", *arguments),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        warnings.simplefilter("ignore")  # errors in tests, and of torchtune's own recipes too
        try:
            tune_command.main()
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def run_program(module: Any, folder: Path, *arguments: Any) -> None:
    """Call the ``main`` of a module of ``torchfuse.recipes`` with a command line."""
    with _command_line(folder, module.__name__, *arguments):
        module.main()


def run_program_on_ranks(module: Any, folder: Path, *arguments: Any) -> str:
    """Like ``run_program``, on two ranks; returns what they print."""
    with tempfile.TemporaryDirectory() as printed:
        run_on_ranks(_main_on_rank, module.__name__, folder, arguments, printed)
        return "".join(file.read_text() for file in sorted(Path(printed).iterdir()))


def _main_on_rank(rank: int, name: str, folder: Path, arguments: tuple[Any, ...], printed: str) -> None:
    # ``run_on_ranks`` makes and destroys the process group.
    with (
        patch.multiple(distributed, init_process_group=DEFAULT, destroy_process_group=DEFAULT),
        Path(printed, str(rank)).open("w") as file,
        contextlib.redirect_stdout(file),
    ):
        run_program(importlib.import_module(name), folder, *arguments)


def start(folder: Path, *command: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; ``tune`` is the one beside this interpreter."""
    program, *arguments = map(str, command)
    return subprocess.run(
        [str(Path(sys.executable).parent / program), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
