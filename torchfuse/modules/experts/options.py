"""How many experts a modality has, and how they choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from torchfuse.errors import ConfigError

__all__ = ["ExpertOptions"]

Start = Literal["warm", "zero"]


@dataclass(frozen=True)
class ExpertOptions:
    """How many experts there are, and how they choose.

    Args:
        num_experts: new experts of each modality but text; a mapping: by modality.
        num_text_experts: experts of text, the pretrained feed-forward among them.
        capacity: the share of its modality's tokens that an expert takes, in (0, 1]. None: one
            divided by the number of the modality's experts.
        start: what experts of other modalities begin as: ``"warm"``, copies of the pretrained
            feed-forward; ``"zero"``, such copies with an output of zero.
        noise: whether noise is added to the routers' scores in training.
        auxiliary_router: whether small routers learn to predict the choice, so that the model can
            generate, and be evaluated token by token.
        auxiliary_dim: width inside them. None: the decoder's.
        auxiliary_loss_weight: what their loss, the mean over a batch, is multiplied by, relative to the
            main loss (see ``mark_main_loss``).

    Raises:
        ConfigError: naming every number that is out of its range.
    """

    num_experts: int | Mapping[str, int] = 4
    num_text_experts: int = 1
    capacity: float | None = None
    start: Start = "warm"
    noise: bool = True
    auxiliary_router: bool = True
    auxiliary_dim: int | None = None
    auxiliary_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        counts: dict[str, int | None] = {
            "num_text_experts": self.num_text_experts,
            "auxiliary_dim": self.auxiliary_dim,
        }
        if isinstance(self.num_experts, Mapping):
            counts |= {f"num_experts of {name!r}": count for name, count in self.num_experts.items()}
        else:
            counts["num_experts"] = self.num_experts
        problems = [
            f"{name} must be at least 1, got {count}"
            for name, count in counts.items()
            if count is not None and count < 1
        ]
        if self.capacity is not None and not 0 < self.capacity <= 1:
            problems.append(f"capacity must lie in (0, 1], got {self.capacity}")
        if self.start not in get_args(Start):
            problems.append(
                f"start must be {' or '.join(map(repr, get_args(Start)))}, got {self.start!r}"
            )
        if not 0 <= self.auxiliary_loss_weight < float("inf"):
            problems.append(f"auxiliary_loss_weight must be 0 or more, got {self.auxiliary_loss_weight}")
        if problems:
            raise ConfigError(f"Experts: {'; '.join(problems)}.")
