"""What answering took: seconds by phase, tokens and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

__all__ = ["Phase", "Report", "peak_memory"]

Phase = Literal["encode", "prefill", "decode", "compile"]

_PREFIXES: Final = ("", "k", "M", "G", "T")


@dataclass
class Report:
    """Counts and times of all prompts; prints as a few lines.

    Attributes:
        prompts: prompts that were answered.
        images: images that the encoder ran on.
        prompt_tokens: tokens of the prompts, without padding.
        tokens: tokens of the answers, their stop tokens included.
        seconds: by phase: ``"encode"`` (encoder and adapter), ``"prefill"`` (prompts), ``"decode"`` (all
            steps after them) and ``"compile"``, which is in none of the others.
    """

    prompts: int = 0
    images: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: defaultdict[Phase, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timing(self, phase: Phase, device: torch.device) -> Iterator[Callable[[Phase], None]]:
        """Time the body of a ``with`` statement as a phase, or as several.

        Args:
            phase: the first phase.
            device: where the work runs; it is waited for at each end of a phase.

        Yields:
            A function that ends the current phase and begins the one it is called with.
        """
        current, started, compiled = phase, _clock(device), _compile_seconds()

        def begin(following: Phase) -> None:
            nonlocal current, started, compiled
            now, total = _clock(device), _compile_seconds()
            self.seconds[current] += now - started - (total - compiled)
            self.seconds["compile"] += total - compiled
            current, started, compiled = following, now, total

        try:
            yield begin
        finally:
            begin(phase)

    def count(self, prompt_tokens: int, answers: list[list[int]]) -> None:
        """Add answered prompts: the number of their tokens, and the ids of each answer."""
        self.prompts += len(answers)
        self.prompt_tokens += prompt_tokens
        self.tokens += sum(map(len, answers))

    def lines(self, device: torch.device) -> list[str]:
        """Return the report as lines of text.

        Args:
            device: where the model is, for its peak memory.
        """
        seconds, total = self.seconds, sum(self.seconds.values())
        peak, owner = peak_memory(device)
        lines = [
            f"{self.tokens} tokens for {self.prompts} prompts in {total:.2f} s on {device}",
            f"  images:    {self.images} encoded in {seconds['encode']:.3f} s",
        ]
        if seconds["compile"]:
            lines.append(f"  compiling: {seconds['compile']:.2f} s, in none of the other times")
        if seconds["prefill"]:
            lines.append(f"  prefill:   {self.prompt_tokens} tokens in {seconds['prefill']:.3f} s")
        if seconds["decode"]:
            # The first token of each answer is the prefill's.
            steps = self.tokens - self.prompts
            lines.append(f"  decoding:  {steps / seconds['decode']:.1f} tokens/s")
        return [*lines, f"  memory:    {_bytes(peak)} at its peak, {owner}"]


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the most bytes that were in use at once, and what used them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), f"allocated by tensors on {device}"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024), "the whole process with its libraries"


def _clock(device: torch.device) -> float:
    """Return the time in seconds, once a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compile_seconds() -> float:
    """Return how long this process has been compiling, as torch measures it."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0


def _bytes(number: float) -> str:
    """Return a number of bytes with three significant digits.

    Examples:
        >>> _bytes(36_100_000), _bytes(987)
        ('36.1 MB', '987 B')
    """
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}B"
