"""Results of rank zero, and errors of any rank, on every rank.

Without a process group the process is rank zero, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from torchfuse.errors import CheckpointError

__all__ = ["agree", "coordination_group", "from_rank_zero", "is_rank_zero"]

_T = TypeVar("_T")

_coordination: tuple[Any, Any] = (None, None)


def is_rank_zero() -> bool:
    """Whether this process is rank zero, which writes files."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def coordination_group() -> Any:
    """Return a group of all ranks on the CPU for checkpoints only; None without a process group.

    Training continues while a checkpoint is written: in one group their messages would be mixed up.
    """
    global _coordination
    if not distributed.is_initialized():
        return None
    world = distributed.group.WORLD
    if _coordination[0] is not world:
        _coordination = (world, distributed.new_group(backend="gloo"))
    return _coordination[1]


def from_rank_zero(group: Any, make: Callable[[], _T]) -> _T:
    """Return on every rank what ``make`` returns on rank zero, or raise what it raises there.

    Args:
        group: what ``coordination_group`` returned.
        make: called on rank zero only; its result is sent to all, so it must be small.
    """
    box: list[Any] = [None, None]
    if is_rank_zero():
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    if group is not None:
        distributed.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1]
    return box[0]


def agree(group: Any, problems: list[str], headline: str, same: Any = None) -> None:
    """Raise one error on every rank if there is a problem on any.

    Args:
        group: what ``coordination_group`` returned.
        problems: the problems of this rank.
        headline: first line of the error.
        same: a value that must be equal on all ranks.

    Raises:
        CheckpointError: with the problems of all ranks, each once.
    """
    everywhere = [(problems, same)]
    if group is not None:
        everywhere = [([], None)] * distributed.get_world_size(group)
        distributed.all_gather_object(everywhere, (problems, same), group=group)
    if any(other != everywhere[0][1] for _, other in everywhere):
        problems = [f"the ranks disagree: {', '.join(repr(other) for _, other in everywhere)}"]
        everywhere.append((problems, None))
    collected = dict.fromkeys(problem for listed, _ in everywhere for problem in listed)
    if collected:
        raise CheckpointError("\n  ".join([headline, *collected]))
