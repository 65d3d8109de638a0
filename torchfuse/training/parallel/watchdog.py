"""The end of a run whose ranks wait for each other, with a report of what each rank does.

The rank that waits in a collective operation is not the one that causes the hang, and the time-out of
a process group names neither. So a thread of each rank writes what the rank does to the store of the
process group, and the first rank that exceeds the time-out prints the entries of all ranks. This is the
same with NCCL and gloo, and adds no communication to a step.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from torch import distributed

__all__ = ["EXIT_CODE", "Watchdog", "key"]

EXIT_CODE: Final = 124
"""Exit code of a rank that has waited for too long, as of the command ``timeout``."""

_INTERVAL: Final = 10.0  # seconds


class Watchdog:
    """End the process if a part of a step takes too long, and print what every rank does.

    Without a process group it does nothing.

    Args:
        timeout_minutes: how long a part of a step may take.
        end: called with the report, to end the process.

    Examples:
        >>> with Watchdog(30.0) as watchdog:
        ...     watchdog.enter("step 1, data")
    """

    def __init__(self, timeout_minutes: float, end: Callable[[str], Any] | None = None) -> None:
        self._timeout, self._end = 60 * timeout_minutes, end or _print_and_exit
        self._interval = min(_INTERVAL, self._timeout / 4)
        self._part, self._limited, self._since = "start", False, time.monotonic()
        self._main = threading.get_ident()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if distributed.is_initialized():
            # Another connection: the process group's own may be blocked.
            self._store = distributed.distributed_c10d._get_default_store().clone()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(self._interval)

    def enter(self, part: str, *, limited: bool = True) -> None:
        """Note what this rank does from now on.

        Args:
            part: in words, such as ``"step 3, data"``.
            limited: whether it may not take longer than the time-out.
        """
        self._part, self._limited, self._since = part, limited, time.monotonic()

    def _watch(self) -> None:
        rank = distributed.get_rank()
        while not self._stopped.wait(self._interval):
            seconds = time.monotonic() - self._since
            with suppress(RuntimeError):  # the process that holds the store has ended
                self._store.set(key(rank), json.dumps([self._part, seconds, self._innermost_call()]))
            if self._limited and seconds >= self._timeout:
                self._end(self._report(rank, seconds))
                return

    def _innermost_call(self) -> str:
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "an unknown place"
        return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"

    def _report(self, rank: int, seconds: float) -> str:
        """Return what every rank does, with ranks that do the same on one line."""
        ranks: dict[tuple[str, str], list[int]] = defaultdict(list)
        waited: dict[tuple[str, str], float] = defaultdict(float)
        for other in range(distributed.get_world_size()):
            does, age = ("not known", "no known place"), 0.0
            with suppress(RuntimeError):
                if self._store.check([key(other)]):
                    part, age, call = json.loads(self._store.get(key(other)))
                    does = (part, call)
            waited[does] = max(waited[does], age)
            ranks[does].append(other)
        lines = [f"error: rank {rank} has waited for {_minutes(seconds)} in {self._part}."]
        lines += [
            f"  rank {', '.join(map(str, same))}: {part}, for {_minutes(waited[part, call])}, in {call}"
            for (part, call), same in ranks.items()
        ]
        lines.append("  The others wait for the rank that does something else.")
        return "\n".join(lines)


def key(rank: int) -> str:
    """Return the key of the store under which a rank puts what it does."""
    return f"torchfuse_watchdog/{rank}"


def _print_and_exit(report: str) -> None:
    print(report, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)  # the main thread may wait for ever


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
