"""Memory while a million rows are read, each measured in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

ROWS, MOST = 1_000_000, 200e6
SCRIPT = """
import sys
from pathlib import Path
import pyarrow
from torchfuse.data import read_samples

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

read_samples(sys.argv[2])[0]  # imports
before = most = resident()
samples = read_samples(sys.argv[1])
for index, sample in enumerate(samples):
    assert sample.answer == f"answer {index}"
    if index % 1000 == 0:
        most = max(most, resident())
print(len(samples), most - before)
"""


def write(file, num_rows):
    def record(index):
        turns = [{"role": "user", "content": "<image>\\n" + "which ? " * 20}]
        turns.append({"role": "assistant", "content": f"answer {index}"})
        return {"id": str(index), "images": ["a.jpg"], "messages": turns}

    if file.suffix == ".jsonl":
        with file.open("w") as out:
            out.writelines(json.dumps(record(index)) + "\n" for index in range(num_rows))
        return
    import pyarrow
    from pyarrow import parquet

    # One row group of all rows is what pyarrow and pandas write by default.
    batch = pyarrow.Table.from_pylist([record(0)])
    with parquet.ParquetWriter(file, batch.schema) as writer:
        tables = []
        for start in range(0, num_rows, 10_000):
            rows = map(record, range(start, min(start + 10_000, num_rows)))
            tables.append(pyarrow.Table.from_pylist([*rows], batch.schema))
        writer.write_table(pyarrow.concat_tables(tables))


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, name):
    file, small = tmp_path / name, tmp_path / f"small-{name}"
    write(small, 3)
    write(file, ROWS)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, file, small],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, growth = map(int, out.stdout.split())
    print(f"{name}: {file.stat().st_size:,} bytes, {rows:,} rows, memory grew by {growth / 1e6:.1f} MB")
    assert rows == ROWS
    assert growth < MOST
