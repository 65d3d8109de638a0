"""A process whose children save without end and are killed, for ``test_files.py``.

torch is imported once; each child is a fork. What is found after each kill is printed as a line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from torchfuse import get_fusion_params, load_fusion, save_fusion
from torchfuse.io.atomic import write_directory
from torchfuse.io.directory import CheckpointDirectory
from torchfuse.params import register_fusion_module

SHARDS = 3
SIZES = (101, 211)  # of two tensors a file


def artifact(folder: Path) -> tuple[Callable[[int], None], Callable[[], list[float]]]:
    """How to save and how to read an artifact that holds one number everywhere."""
    model = nn.Sequential(nn.Linear(53, 41), nn.Linear(41, 37))
    register_fusion_module(model[1])

    @torch.no_grad()
    def save(number: int) -> None:
        for parameter in get_fusion_params(model).values():
            parameter.fill_(number)
        save_fusion(model, folder)

    @torch.no_grad()
    def read() -> list[float]:
        for parameter in get_fusion_params(model).values():
            parameter.fill_(-1)
        load_fusion(model, folder)
        return [x for p in get_fusion_params(model).values() for x in p.unique().tolist()]

    return save, read


def contents(number: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        f"model-{shard}-of-{SHARDS}.safetensors": {
            f"{shard}.{size}": torch.full((size,), float(number)) for size in SIZES
        }
        for shard in range(SHARDS)
    }


def directory(
    folder: Path, *, whole: bool = True
) -> tuple[Callable[[int], None], Callable[[], list[float]]]:
    """The same of a directory in shards; not ``whole``: file by file in its place, which must be noticed."""

    def write(place: Path, number: int) -> None:
        place.mkdir(exist_ok=True)
        files = contents(number)
        for file, tensors in files.items():
            save_file(tensors, place / file)
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (place / "config.json").write_text(json.dumps({"number": number}))

    def save(number: int) -> None:
        if whole:
            write_directory(folder, lambda place: write(place, number))
        else:
            write(folder, number)

    def read() -> list[float]:
        with CheckpointDirectory(folder) as found:
            assert len(found) == SHARDS * len(SIZES)
            values = [x for name in found for x in found.read(name).unique().tolist()]
            return [*values, found.config["number"]]

    return save, read


def in_place(folder: Path) -> tuple[Callable[[int], None], Callable[[], list[float]]]:
    return directory(folder, whole=False)


def moment(
    save: Callable[[int], None], first: int, delay: float, patience: float = 30.0
) -> tuple[int, int]:
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
    ready, _, _ = select.select([reports], [], [], patience)
    assert ready, "the child does nothing"
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, "the child failed by itself"
    said = b""
    while part := os.read(reports, 1 << 16):
        said += part
    os.close(reports)
    lines = said.decode().split()
    finished = [int(line[1:]) for line in lines if line[0] == "="]
    begun = [int(line[1:]) for line in lines if line[0] == "+"]
    return max(begun), max(finished, default=-1)


def main(kind: str, folder: str, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    save, read = {"artifact": artifact, "directory": directory, "in_place": in_place}[kind](place)
    chance = random.Random(seed)
    times = []
    for number in range(5):  # also what is there before the first kill
        start = time.perf_counter()
        save(number)
        times.append(time.perf_counter() - start)
    usual = sorted(times)[2]
    beside = place if kind == "artifact" else place.parent
    number = done = 4
    for _ in range(num_kills):
        begun, finished = moment(save, number + 1, chance.uniform(0.0, 4.0) * usual)
        done = max(done, finished)
        left = [name for name in os.listdir(beside) if name.startswith(".")]
        try:
            found, problem = sorted(set(read())), None
        except Exception as error:
            found, problem = [], repr(error)
        print(
            json.dumps(
                {
                    "begun": begun,
                    "finished": done,
                    "found": found,
                    "problem": problem,
                    "left": len(left),
                }
            )
        )
        number = begun
    save(number + 1)
    print(json.dumps({"left at the end": [n for n in os.listdir(beside) if n.startswith(".")]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
