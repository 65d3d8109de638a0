"""The record of a training run: losses, accuracies, tokens and time, saved in checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed

__all__ = ["TrainingRecord"]


@dataclass
class TrainingRecord:
    """The record of a training run.

    Attributes:
        losses: pairs of a step, counted from 1, and its loss.
        accuracies: pairs of a step and the accuracy after it.
        tokens: number of tokens that this rank trained on, by modality.
        seconds: seconds of training, without evaluation and saving.
        before: accuracy before the first step, by kind of question.
        samples: number of samples that were left out, by reason.
        skipped_steps: number of steps that were skipped: not finite, or without a supervised token.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    skipped_steps: int = 0

    def of_all_ranks(self, device: torch.device) -> TrainingRecord:
        """Return the record with the tokens and samples of all ranks, each of which calls this.

        Args:
            device: device of the reduction.
        """
        tokens, samples = (_of_all_ranks(counter, device) for counter in (self.tokens, self.samples))
        return replace(self, tokens=tokens, samples=samples)

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values.

        Examples:
            >>> record = TrainingRecord(losses=[(1, 2.5)], tokens=Counter(text=7))
            >>> TrainingRecord.restored(record.state()) == record
            True
        """
        return {
            "losses": [list(pair) for pair in self.losses],
            "accuracies": [list(pair) for pair in self.accuracies],
            "tokens": dict(self.tokens),
            "seconds": self.seconds,
            "before": self.before,
            "samples": dict(self.samples),
            "skipped_steps": self.skipped_steps,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], rank: int = 0) -> TrainingRecord:
        """Return the record from its ``state``.

        Args:
            state: the state of a record of all ranks.
            rank: rank of this process. Rank 0 starts with the counts of all ranks, the others with none.
        """
        return cls(
            losses=[(step, loss) for step, loss in state["losses"]],
            accuracies=[(step, share) for step, share in state["accuracies"]],
            tokens=_of_rank(state["tokens"], rank),
            seconds=state["seconds"],
            before=dict(state["before"]),
            samples=_of_rank(state.get("samples", {}), rank),
            skipped_steps=state.get("skipped_steps", 0),
        )


def _of_rank(counts: Mapping[str, int], rank: int) -> Counter[str]:
    return Counter({name: 0 if rank else count for name, count in counts.items()})


def _of_all_ranks(counter: Counter[str], device: torch.device) -> Counter[str]:
    if not distributed.is_initialized():
        return Counter(counter)
    names = sorted(counter)
    counts = torch.tensor([counter[name] for name in names], device=device)
    distributed.all_reduce(counts)
    return Counter(dict(zip(names, counts.tolist(), strict=True)))
