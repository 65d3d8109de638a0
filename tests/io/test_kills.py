"""What processes leave that are killed while they save: one save, whole, and not an old one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and exchanges in one step")
KINDS = ["artifact", "directory", "run", "asynchronous_run"]


def kill(kinds, folder, num_kills, seed):
    print(f"seed {seed}")
    worker = Path(__file__).with_name("kill_worker.py")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", worker, ",".join(kinds), folder, str(num_kills), str(seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = {line["kind"]: line for line in map(json.loads, run.stdout.splitlines())}
    assert [len(found[kind]["moments"]) for kind in kinds] == [num_kills] * len(kinds)
    return found


def torn(moments):
    """The moments that left not one number everywhere, or one older than the last finished save."""
    return [
        moment
        for moment in moments
        if len(moment["found"]) != 1 or not moment["finished"] <= moment["found"][0] <= moment["begun"]
    ]


def test_a_kill_leaves_one_save_whole(tmp_path):
    for found in kill(KINDS, tmp_path, num_kills=5, seed=5).values():
        assert torn(found["moments"]) == []
        assert found["hidden"] == []


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills_leave_one_save_whole(tmp_path, kind):
    found = kill([kind], tmp_path, num_kills=34, seed=random.randrange(10**6))[kind]
    moments = found["moments"]
    assert torn(moments) == []
    assert found["hidden"] == []
    # Some were killed during a save, with temporary files beside it; how many, a busy machine decides.
    assert sum(moment["begun"] > moment["finished"] for moment in moments) > 2
    assert any(moment["leftovers"] for moment in moments)
    assert len({moment["found"][0] for moment in moments}) > 2


@pytest.mark.long
def test_the_kills_would_show_a_torn_directory(tmp_path):
    found = kill(["in_place"], tmp_path, num_kills=13, seed=random.randrange(10**6))
    assert torn(found["in_place"]["moments"])
