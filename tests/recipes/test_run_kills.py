"""Trainings that are killed, or asked to end, at random moments, end with the bits of an undisturbed one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from torchfuse.training.interruption import EXIT_CODE


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(("kind", "kills", "terminations"), [("moma", 20, 5), ("lora", 8, 2)])
def test_a_run_that_is_killed_resumes_to_the_same_bits(tmp_path, kind, kills, terminations):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    worker = Path(__file__).with_name("kill_run.py")
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", worker, tmp_path, kind, *map(str, (kills, terminations, seed))],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    moments = [json.loads(line) for line in run.stdout.splitlines()]
    print(*moments, sep="\n")
    assert [moment["signal"] for moment in moments] == ["SIGKILL"] * kills + ["SIGTERM"] * terminations
    assert all(moment["same"] for moment in moments)
    assert [moment["code"] for moment in moments] == [-9] * kills + [EXIT_CODE] * terminations
    assert sum(moment["saved"] > 0 for moment in moments) > (kills + terminations) // 3
