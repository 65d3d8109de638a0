"""What training was like, as it goes and as it is kept in a checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed

__all__ = ["TrainingRecord"]


@dataclass
class TrainingRecord:
    """What training was like.

    Attributes:
        losses: steps, counted from 1, each with its loss.
        accuracies: steps after which questions were asked, each with the share of right answers.
        tokens: how many this rank trained on, by modality.
        seconds: how long it took, without those in which questions were asked or the run was saved.
        before: the share of right answers before the first step, by kind of question.
    """

    losses: list[tuple[int, float]] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)

    def of_all_ranks(self, device: torch.device) -> TrainingRecord:
        """The record with the tokens of all ranks, each of which calls this.

        Args:
            device: where the ranks can add up.
        """
        tokens = Counter(self.tokens)
        if distributed.is_initialized():
            names = sorted(tokens)
            counts = torch.tensor([tokens[name] for name in names], device=device)
            distributed.all_reduce(counts)
            tokens = Counter(dict(zip(names, counts.tolist(), strict=True)))
        return TrainingRecord(self.losses, self.accuracies, tokens, self.seconds, self.before)

    def state(self) -> dict[str, Any]:
        """The record in JSON's types.

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
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], rank: int = 0) -> TrainingRecord:
        """The record that ``state`` was of.

        Args:
            state: what ``state`` returned for the record of all ranks.
            rank: of this process; the first one goes on counting where all of them were.
        """
        return cls(
            losses=[(step, loss) for step, loss in state["losses"]],
            accuracies=[(step, share) for step, share in state["accuracies"]],
            tokens=Counter({name: 0 if rank else count for name, count in state["tokens"].items()}),
            seconds=state["seconds"],
            before=dict(state["before"]),
        )
