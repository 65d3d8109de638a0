"""Resident memory of this process, from Linux's /proc."""

from __future__ import annotations

import re
from pathlib import Path


def resident(field: str) -> int:
    """Return a size of this process in bytes: ``VmRSS``, or its peak ``VmHWM``."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    assert found is not None
    return 1024 * int(found[1])


def reset_peak() -> None:
    """Set ``VmHWM`` to the present ``VmRSS``."""
    Path("/proc/self/clear_refs").write_text("5")
