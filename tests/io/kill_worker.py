"""A process whose children save in a loop and are killed, for ``test_kills.py``.

torch is imported once; each child is a fork. What was found after each kill is printed as JSON, a line
a kind.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from torchfuse import get_fusion_params, load_fusion, save_fusion
from torchfuse.checkpoint import load_checkpoint, save_checkpoint
from torchfuse.io.atomic import write_directory
from torchfuse.io.directory import CheckpointDirectory
from torchfuse.params import register_fusion_module

Save, Read = Callable[[int], None], Callable[[], list[float]]
NUM_SHARDS = 3
SIZES = (101, 211)  # of two tensors in a shard


@torch.no_grad()
def fill(tensors: list[torch.Tensor], number: float) -> None:
    for tensor in tensors:
        tensor.fill_(number)


def values(tensors: list[torch.Tensor]) -> list[float]:
    return [value for tensor in tensors for value in tensor.unique().tolist()]


# How to save and how to read something that has one number everywhere.


def artifact(folder: Path) -> tuple[Save, Read]:
    model = nn.Sequential(nn.Linear(53, 41), nn.Linear(41, 37))
    register_fusion_module(model[1])
    tensors = list(get_fusion_params(model).values())

    def save(number: int) -> None:
        fill(tensors, number)
        save_fusion(model, folder / "artifact")

    def read() -> list[float]:
        fill(tensors, -1)
        load_fusion(model, folder / "artifact")
        return values(tensors)

    return save, read


def directory(folder: Path, *, atomic: bool = True) -> tuple[Save, Read]:
    path = folder / "directory"

    def write(place: Path, number: int) -> None:
        place.mkdir(exist_ok=True)
        weight_map = {}
        for shard in range(NUM_SHARDS):
            file = f"model-{shard}-of-{NUM_SHARDS}.safetensors"
            tensors = {f"{shard}.{size}": torch.full((size,), float(number)) for size in SIZES}
            save_file(tensors, place / file)
            weight_map |= dict.fromkeys(tensors, file)
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (place / "config.json").write_text(json.dumps({"number": number}))

    def save(number: int) -> None:
        if atomic:
            write_directory(path, lambda place: write(place, number))
        else:
            write(path, number)

    def read() -> list[float]:
        with CheckpointDirectory(path) as found:
            assert len(found) == NUM_SHARDS * len(SIZES)
            return [*values([found.read(name) for name in found]), found.config["number"]]

    return save, read


def in_place(folder: Path) -> tuple[Save, Read]:
    return directory(folder, atomic=False)


def run(folder: Path, *, asynchronous: bool = False) -> tuple[Save, Read]:
    model = nn.Sequential(nn.Linear(37, 1031), nn.Linear(1031, 7))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 37)).sum().backward()
    optimizer.step()

    def tensors() -> list[torch.Tensor]:
        states = optimizer.state.values()  # new tensors after each load
        return [p.detach() for p in model.parameters()] + [t for state in states for t in state.values()]

    def save(number: int) -> None:
        fill(tensors(), number)
        optimizer.param_groups[0]["lr"] = float(number)
        save = save_checkpoint(
            folder, model, optimizer, step=number, extra={"number": number}, asynchronous=asynchronous
        )
        fill(tensors(), -1)
        save.wait()

    def read() -> list[float]:
        fill(tensors(), -1)
        loaded = load_checkpoint(folder, model, optimizer)
        for path in folder.glob("step_*"):
            if path != loaded.path:
                shutil.rmtree(path)
        lr = optimizer.param_groups[0]["lr"]
        return [*values(tensors()), loaded.step, loaded.extra["number"], lr]

    return save, read


def asynchronous_run(folder: Path) -> tuple[Save, Read]:
    return run(folder, asynchronous=True)


KINDS = {make.__name__: make for make in (artifact, directory, in_place, run, asynchronous_run)}


def kill_one(save: Save, first: int, delay: float) -> tuple[int, int]:
    """Let a child save from a number on and kill it.

    Returns:
        The last number begun, and the last finished or -1.
    """
    reports, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for number in range(first, first + 1_000_000):
                os.write(report, f"+{number}\n".encode())
                save(number)
                os.write(report, f"={number}\n".encode())
        finally:
            os._exit(1)
    os.close(report)
    ready, _, _ = select.select([reports], [], [], 120)
    assert ready, "the child does nothing"
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child failed by itself"
    with os.fdopen(reports) as stream:
        lines = stream.read().split()
    finished = [int(line[1:]) for line in lines if line[0] == "="]
    begun = [int(line[1:]) for line in lines if line[0] == "+"]
    return max(begun), max(finished, default=-1)


def main(kind: str, folder: Path, num_kills: int, seed: int) -> None:
    save, read = KINDS[kind](folder)
    chance = random.Random(seed)
    durations = []
    for number in range(5):  # the first one is what a kill finds if nothing else was saved
        start = time.perf_counter()
        save(number)
        durations.append(time.perf_counter() - start)
    usual = sorted(durations)[2]
    hidden = lambda: [p.name for p in folder.rglob(".*") if p.name != ".metadata"]  # noqa: E731
    last = finished = 4
    moments = []
    for _ in range(num_kills):
        begun, done = kill_one(save, last + 1, chance.uniform(0.0, 4.0) * usual)
        finished = max(finished, done)
        moment = {"begun": begun, "finished": finished, "leftovers": len(hidden())}
        try:
            moments.append(moment | {"found": sorted(set(read())), "problem": None})
        except Exception as error:
            moments.append(moment | {"found": [], "problem": repr(error)})
        last = begun
    save(last + 1)
    print(json.dumps({"kind": kind, "moments": moments, "hidden": hidden()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[1].split(","):
        folder = Path(sys.argv[2], kind)
        folder.mkdir()
        main(kind, folder, int(sys.argv[3]), int(sys.argv[4]))
