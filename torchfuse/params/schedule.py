"""Freeze stages, applied to a model when training reaches their steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from weakref import WeakKeyDictionary

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.naming import named_parameters, unwrap_model
from torchfuse.params.freezing import FreezeSpec, freeze_mask
from torchfuse.params.stages import FreezeStage, effective_freeze, in_order
from torchfuse.params.trainable import set_requires_grad

__all__ = ["FreezeSchedule"]

_InForce = tuple[tuple[FreezeSpec, ...], dict[str, bool]]


class FreezeSchedule:
    """Stages of freeze specs, applied as training reaches them.

    Call ``apply(model, step)`` before every optimizer step; it changes the model where a stage begins.
    Parameters that any stage trains are in the optimizer from the start
    (``param_groups(model, lr=..., stages=schedule)``). While frozen they have no gradient, so the
    optimizer neither updates nor decays them.

    To resume, build model, schedule and optimizer as for a new run, load the checkpoint into them, and
    continue to call ``apply`` with the number of steps taken.

    Args:
        stages: in any order; a spec outside of any stage is in force from the start. None: nothing is
            ever changed.

    Raises:
        ConfigError: if two stages start at one step.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
        >>> schedule = FreezeSchedule(
        ...     [
        ...         FreezeStage(0, (FreezeSpec("0", True),)),
        ...         FreezeStage(4, (FreezeSpec("0", False),)),
        ...     ]
        ... )
        >>> [schedule.apply(model, step) for step in (0, 1, 3, 5, 6)]  # step 4 is skipped
        [True, False, False, True, False]
    """

    def __init__(self, stages: Iterable[FreezeSpec | FreezeStage] = ()) -> None:
        self.stages = in_order(stages)
        # For each model the specs last applied, and their mask: a step inside a stage is cheap.
        self._last: WeakKeyDictionary[nn.Module, _InForce] = WeakKeyDictionary()

    def __iter__(self) -> Iterator[FreezeStage]:
        return iter(self.stages)

    def check(self, model: nn.Module) -> None:
        """Check every stage against a model, later ones too.

        Args:
            model: a fused model, or any module.

        Raises:
            ConfigError: naming every spec of every stage that does not fit, as ``apply_freeze_specs``.
        """
        problems = [
            f"stage at step {stage.start_step}: {problem}"
            for stage in self.stages
            for problem in freeze_mask(model, stage.specs)[1]
        ]
        if problems:
            raise ConfigError(f"The freeze stages do not fit the model: {'; '.join(problems)}.")

    def apply(self, model: nn.Module, step: int) -> bool:
        """Apply the specs in force at a step; call it before each optimizer step.

        A stage whose first step was skipped is applied too. Parameters that no stage has matched so far
        stay as they are.

        Args:
            model: a fused model, or any module.
            step: how many optimizer steps have been taken.

        Returns:
            Whether any parameter started or stopped training.

        Raises:
            ConfigError: if any stage, later ones too, does not fit the model; nothing has changed then.
        """
        specs = effective_freeze(self.stages, step)
        inner = unwrap_model(model)
        last, mask = self._last.get(inner, (None, {}))
        now = {name: p.requires_grad for name, p in named_parameters(model)} if specs else {}
        if specs == last and all(now.get(name) == trains for name, trains in mask.items()):
            return False
        self.check(model)
        mask, _ = freeze_mask(model, specs)
        if mask:
            set_requires_grad(model, mask)
        self._last[inner] = (specs, mask)
        return any(now[name] != trains for name, trains in mask.items())

    def trained_ever(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that train now or in some stage.

        Call it before the first ``apply``, or after one at step 0, on a model as it was built.

        Args:
            model: a fused model, or any module.

        Raises:
            ConfigError: as ``check``, and if at the beginning of a stage nothing trains.
        """
        self.check(model)
        trains = {name: p.requires_grad for name, p in named_parameters(model)}
        ever: set[str] = set()
        idle: list[int] = []
        for step in sorted({0, *(stage.start_step for stage in self.stages)}):
            mask, _ = freeze_mask(model, effective_freeze(self.stages, step))
            then = {name for name, now in trains.items() if mask.get(name, now)}
            ever |= then
            if self.stages and not then:
                idle.append(step)
        if idle:
            raise ConfigError(
                f"Nothing trains from step {', '.join(map(str, idle))} on: add a spec with "
                "frozen=False for what does."
            )
        return [name for name in trains if name in ever]
