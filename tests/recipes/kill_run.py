"""Trainings that get a signal at a random moment and are started again, for ``test_run_kills.py``.

What is imported is imported once; each training is a fork. The result of each is printed as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from own_data import configuration, make_folder
from programs import run_program
from torchfuse.recipes import finetune, finetune_run  # noqa: F401  # imported before the forks

TRAIN = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "max_steps": 40, "lr": 0.01}


def start(folder: Path, output: Path) -> int:
    """Start a training that resumes if there is a checkpoint; return the id of its process."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        arguments = ["--config", folder / "config.yaml", f"output_dir={output}", "resume=true"]
        run_program(finetune, folder, *arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(output: Path) -> str:
    """A digest of the weights and the losses of a training that is complete."""
    files = [output / "fusion" / "fusion.safetensors", output / "losses.json"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main(folder: Path, num_kills: int, num_terminations: int, seed: int) -> None:
    make_folder(folder)
    configuration(folder, "moma", train=TRAIN, save_every=3)
    began = time.perf_counter()
    assert wait(start(folder, folder / "whole")) == 0, (folder / "whole.log").read_text()[-2000:]
    duration = time.perf_counter() - began
    expected = result(folder / "whole")
    chance = random.Random(seed)
    signals = [signal.SIGKILL] * num_kills + [signal.SIGTERM] * num_terminations
    for number, kind in enumerate(signals):
        output = folder / str(number)
        child = start(folder, output)
        time.sleep(chance.uniform(0, duration))
        os.kill(child, kind)
        code = wait(child)
        saved = [int(path.name[5:]) for path in output.glob("checkpoints/step_*")]
        again = wait(start(folder, output))
        moment = {
            "signal": kind.name,
            "code": code,
            "saved": max(saved, default=0),
            "again": again,
            "same": again == 0 and result(output) == expected,
        }
        print(json.dumps(moment), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
