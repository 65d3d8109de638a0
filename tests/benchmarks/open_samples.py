"""Seconds and memory for opening and reading LLaVA records: one JSON array, JSON lines, Parquet.

Memory is what is resident after a step over what was before it, so pages of files that stay mapped count.

Run: python tests/benchmarks/open_samples.py [--rows 200000] [--read 20000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from sample_records import llava, write_array, write_lines

from torchfuse.data import Mixture, read_samples

WORDS = 'the cat, a "quoted" word [in] {brackets} runs over the bridge \\ and back again'.split()
NUM_IMAGES = 100  # few and shared


def record(index: int, generator: random.Random) -> dict:
    """A record with a few turns of text, of lengths as LLaVA's are: log-normal."""
    turns = []
    for turn in range(2 * generator.choice([1, 1, 2, 4])):
        length = min(int(generator.lognormvariate(3.2, 1.0)) + 1, 800)
        turns.append(" ".join(generator.choices(WORDS, k=length)))
        if not turn:
            turns[0] = f"<image>\n{turns[0]}"
    return llava(*turns, id=f"{index:012}", image=f"images/{index % NUM_IMAGES}.jpg")


def write(folder: Path, num_rows: int) -> list[Path]:
    """Write the records in every format, unless that has been done."""
    import pyarrow
    from pyarrow import parquet

    files = [folder / name for name in ("array.json", "lines.jsonl", "table.parquet")]
    if all(file.exists() for file in files):
        return files
    generator = random.Random(0)
    records = [record(index, generator) for index in range(num_rows)]
    write_array(files[0], records)
    write_lines(files[1], records)
    parquet.write_table(pyarrow.Table.from_pylist(records), files[2])
    return files


def resident() -> float:
    """Return the resident memory of this process in MB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def clock() -> tuple[float, float]:
    """Return seconds that passed, and seconds of CPU."""
    return time.perf_counter(), time.process_time()


def measure(file: Path, num_read: int) -> None:
    before, start = resident(), clock()
    samples = read_samples(file)
    opened, worked = (now - then for now, then in zip(clock(), start, strict=True))
    order = Mixture([(samples, None)]).epoch(0)
    rates = []
    for picked in (samples[:num_read], order[:num_read]):
        _, then = clock()
        for sample in picked:
            assert sample.answer is not None
        rates.append(len(picked) / (clock()[1] - then))
    print(
        f"{file.name:<14} {file.stat().st_size / 1e6:7.0f} MB {len(samples):9,} rows  "
        f"open {opened:5.2f} s, {worked:5.2f} s of CPU  rows per second of CPU: {rates[0]:6,.0f} in order, "
        f"{rates[1]:6,.0f} shuffled  memory {resident() - before:+6.1f} MB"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--read", type=int, default=20_000, help="rows that are read")
    parser.add_argument("--folder", type=Path, help="where the files are or shall be kept")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as tmp:
        folder = options.folder or Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        for file in write(folder, options.rows):
            measure(file, min(options.read, options.rows))


if __name__ == "__main__":
    main()
