"""Trainings that get a signal at a random moment and are started again, for ``test_run_kills.py``.

What is imported is imported once; each training is a fork. A moment is a random number of steps and a random
part of the time that a few more of them take, as long as they took until then: on a busy machine it is during
training too. The result of each is printed as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from own_data import configuration, make_folder
from programs import run_program
from torchfuse.recipes import finetune, finetune_run  # noqa: F401  # imported before the forks

from torchfuse.training.progress import Progress

STEPS, SAVE_EVERY = 24, 3
TRAIN = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "max_steps": STEPS, "lr": 0.01}

LORA = {
    "decoder": {"rank": 3, "dropout": 0.1},
    "encoder": {"rank": 2, "targets": ["q_proj", "w?"], "dora": True},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "moma": ("moma", {}),
    "lora": ("cross_attention", {"lora": LORA}),
}


def start(folder: Path, output: Path, chance: random.Random | None = None, kind: int = 0) -> int:
    """Start a training that resumes if there is a checkpoint; return the id of its process.

    With ``chance`` it gets the signal ``kind`` at a random moment.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if chance is not None:
            send_during_training(kind, chance)
        arguments = ["--config", folder / "config.yaml", f"output_dir={output}", "resume=true"]
        run_program(finetune, folder, *arguments)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def send_during_training(kind: int, chance: random.Random) -> None:
    """Let this process get a signal after a random number of steps, saves included."""
    moment, part = chance.randint(2, STEPS // 2), chance.uniform(0, SAVE_EVERY)
    began, update = time.monotonic(), Progress.update

    def count(self: Progress, step: int, metrics: object) -> None:
        nonlocal began
        update(self, step, metrics)
        if step == 1:
            began = time.monotonic()
        if step == moment:
            seconds = part * (time.monotonic() - began) / (step - 1)
            timer = threading.Timer(seconds, os.kill, (os.getpid(), kind))
            timer.daemon = True
            timer.start()

    Progress.update = count


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(output: Path) -> str:
    """A digest of the weights and the losses of a training that is complete."""
    files = [output / "fusion" / "fusion.safetensors", output / "losses.json"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main(folder: Path, name: str, num_kills: int, num_terminations: int, seed: int) -> None:
    make_folder(folder)
    arch, changes = RUNS[name]
    configuration(folder, arch, train=TRAIN, save_every=SAVE_EVERY, **changes)
    assert wait(start(folder, folder / "whole")) == 0, (folder / "whole.log").read_text()[-2000:]
    expected = result(folder / "whole")
    signals = [signal.SIGKILL] * num_kills + [signal.SIGTERM] * num_terminations
    for number, kind in enumerate(signals):
        output = folder / str(number)
        code = wait(start(folder, output, random.Random(f"{seed} {number}"), kind))
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
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
