"""Kills savers: forks a process that saves in a loop, ends it by SIGKILL at a random moment, looks at what is left.

Run as a program, with a folder and a number of kills. It prints what it saw as JSON, or fails.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from torchfuse.checkpoint.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(37, 1031), nn.Linear(1031, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 37)).sum().backward()
    optimizer.step()
    return model, optimizer


def tensors(model, optimizer):
    yield from (p.detach() for p in model.parameters())
    for state in optimizer.state.values():
        yield from state.values()


def fill(model, optimizer, value):
    for tensor in tensors(model, optimizer):
        tensor.fill_(value)
    optimizer.param_groups[0]["lr"] = float(value)


def save_for_ever(folder, model, optimizer, start, asynchronous, report):
    step = start
    while True:
        fill(model, optimizer, step)
        save = save_checkpoint(
            folder, model, optimizer, step=step, extra={"is": step}, asynchronous=asynchronous
        )
        fill(model, optimizer, -1)
        save.wait()
        os.write(report, b"%d\n" % step)
        step += 1


def kill_one(folder, model, optimizer, start, asynchronous, delay):
    """Start a saver, kill it after ``delay`` seconds; the steps that it said were saved."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(folder, model, optimizer, start, asynchronous, writer)
        finally:
            os._exit(1)
    os.close(writer)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the saver ended by itself"
    with os.fdopen(reader) as stream:
        return [int(line) for line in stream]


def check(folder, model, optimizer, said):
    """The newest checkpoint loads and is all of one step, which is not older than what was said."""
    path = latest_checkpoint(folder)
    if path is None:
        assert not said
        return -1
    loaded = load_checkpoint(folder, model, optimizer)
    assert loaded.path == path
    assert loaded.step == loaded.extra["is"] == optimizer.param_groups[0]["lr"]
    assert all(bool((tensor == loaded.step).all()) for tensor in tensors(model, optimizer))
    assert loaded.step >= max(said, default=0)
    return loaded.step


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(7)
    model, optimizer = make()
    amid, newest = 0, -1
    for index in range(kills):
        delay = chance.uniform(0.0, 0.3)
        said = kill_one(folder, model, optimizer, newest + 1, index % 2 == 1, delay)
        left_over = [path for path in folder.iterdir() if path.name.endswith(".saving")]
        assert len(left_over) <= 1, left_over  # of this saver; it removed those before
        amid += len(left_over)
        step = check(folder, model, optimizer, said)
        assert step >= newest
        newest = step
        for path in folder.glob("step_*"):
            if path.name != f"step_{newest}":
                shutil.rmtree(path)
    save_checkpoint(folder, model, optimizer, step=newest + 1)
    hidden = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
    print(json.dumps({"kills": kills, "amid": amid, "newest": newest, "hidden": hidden}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
