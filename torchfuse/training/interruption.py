"""The end of a run on SIGTERM, after its current step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Final

import torch
from torch import distributed

__all__ = ["EXIT_CODE", "Interruption"]

EXIT_CODE: Final = 75
"""Exit code of a run that saved and ended on SIGTERM: ``EX_TEMPFAIL``, to be started again."""


class Interruption:
    """Record SIGTERM inside of a ``with`` statement, in place of ending the process.

    Examples:
        >>> import os
        >>> with Interruption() as interruption:
        ...     before = interruption.requested(torch.device("cpu"))
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     before, interruption.requested(torch.device("cpu"))
        (False, True)
    """

    def __init__(self) -> None:
        self._received = False
        self._earlier: Any = None

    def __enter__(self) -> Interruption:
        try:
            self._earlier = signal.signal(signal.SIGTERM, self._receive)
        except ValueError:  # not in the main thread
            self._earlier = None
        return self

    def __exit__(self, *error: object) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGTERM, self._earlier)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def requested(self, device: torch.device) -> bool:
        """Return whether any rank has received the signal; every rank calls this.

        Args:
            device: device of the reduction.
        """
        if not distributed.is_initialized():
            return self._received
        received = torch.tensor(float(self._received), device=device)
        distributed.all_reduce(received, distributed.ReduceOp.MAX)
        return bool(received)
