"""Freeze specs with the step from which they are in force, and a record of them.

Stages add up. The specs in force at a step are those of all stages that have begun, in order, so that
what trains is a function of the step alone: a run that resumes in a later stage, or skips the first step
of a stage, trains what an uninterrupted run trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torchfuse.errors import ConfigError
from torchfuse.params.freezing import FreezeSpec

__all__ = [
    "FreezeStage",
    "canonical_freeze_meta",
    "effective_freeze",
    "in_order",
    "read_freeze_meta",
]

_STAGE_KEYS: Final = ("start_step", "specs")
_SPEC_KEYS: Final = ("module", "frozen")


@dataclass(frozen=True)
class FreezeStage:
    """Freeze specs that are in force from a step on.

    Args:
        start_step: how many optimizer steps have been taken when the stage begins; 0 is the start.
        specs: in their order, a later one overrides an earlier one.

    Raises:
        ConfigError: if ``start_step`` is no such number, or ``specs`` is empty or holds anything else.

    Examples:
        >>> FreezeStage(500, (FreezeSpec("encoder.layers.11", frozen=False),)).start_step
        500
    """

    start_step: int
    specs: tuple[FreezeSpec, ...]

    def __post_init__(self) -> None:
        problems = []
        if type(self.start_step) is not int or self.start_step < 0:
            problems.append(f"start_step must be a whole number from 0 on, got {self.start_step!r}")
        specs: Any = self.specs
        if not isinstance(specs, tuple | list) or not specs:
            problems.append(f"specs must be a sequence of at least one FreezeSpec, got {specs!r}")
        else:
            others = [spec for spec in specs if not isinstance(spec, FreezeSpec)]
            problems += [f"specs must be FreezeSpecs, got {spec!r}" for spec in others]
            object.__setattr__(self, "specs", tuple(specs))
        if problems:
            raise ConfigError(f"FreezeStage: {'; '.join(problems)}.")


def in_order(given: Iterable[FreezeSpec | FreezeStage]) -> tuple[FreezeStage, ...]:
    """Sort stages by their steps; specs outside of any stage become part of the stage at step 0.

    Args:
        given: stages and specs in any order.

    Raises:
        ConfigError: if two stages start at one step, or something else is among them.
    """
    items = list(given)
    loose = tuple(item for item in items if isinstance(item, FreezeSpec))
    stages = [item for item in items if isinstance(item, FreezeStage)]
    steps = [stage.start_step for stage in stages]
    others = [item for item in items if not isinstance(item, FreezeSpec | FreezeStage)]
    problems = [f"expected FreezeStages, got {item!r}" for item in others]
    problems += [
        f"{steps.count(step)} stages start at step {step}; make them one"
        for step in sorted(set(steps))
        if steps.count(step) > 1
    ]
    if problems:
        raise ConfigError(f"Freeze stages: {'; '.join(problems)}.")
    if loose:
        first = next((stage.specs for stage in stages if stage.start_step == 0), ())
        stages = [FreezeStage(0, loose + first), *(stage for stage in stages if stage.start_step)]
    return tuple(sorted(stages, key=lambda stage: stage.start_step))


def effective_freeze(stages: Iterable[FreezeSpec | FreezeStage], step: int) -> tuple[FreezeSpec, ...]:
    """Return the specs in force at a step, in their order, for ``apply_freeze_specs``.

    Args:
        stages: in any order; a spec outside of any stage is in force from the start.
        step: how many optimizer steps have been taken.

    Raises:
        ConfigError: if two stages start at one step, or ``step`` is no whole number from 0 on.

    Examples:
        >>> stages = [
        ...     FreezeStage(0, (FreezeSpec("encoder", True),)),
        ...     FreezeStage(5, (FreezeSpec("encoder", False),)),
        ... ]
        >>> [spec.frozen for spec in effective_freeze(stages, 4)]
        [True]
        >>> [spec.frozen for spec in effective_freeze(stages, 7)]
        [True, False]
    """
    if type(step) is not int or step < 0:
        raise ConfigError(f"step must be a whole number from 0 on, got {step!r}.")
    return tuple(spec for s in in_order(stages) if s.start_step <= step for spec in s.specs)


def canonical_freeze_meta(stages: Iterable[FreezeSpec | FreezeStage]) -> list[dict[str, Any]]:
    """Return a record of stages in JSON's types, equal for equal schedules, for ``read_freeze_meta``.

    Stages are ordered by step; specs keep their order, in which a later one overrides an earlier one.

    Args:
        stages: as for ``effective_freeze``.

    Raises:
        ConfigError: if two stages start at one step.

    Examples:
        >>> canonical_freeze_meta([FreezeSpec("encoder", True)])
        [{'start_step': 0, 'specs': [{'module': 'encoder', 'frozen': True}]}]
    """
    return [
        {
            "start_step": stage.start_step,
            "specs": [{"module": spec.module, "frozen": spec.frozen} for spec in stage.specs],
        }
        for stage in in_order(stages)
    ]


def read_freeze_meta(meta: Any) -> tuple[FreezeStage, ...]:
    """Read stages from what ``canonical_freeze_meta`` returned, or from the same in YAML.

    Args:
        meta: a list of ``{"start_step": ..., "specs": [{"module": ..., "frozen": ...}]}``.

    Raises:
        ConfigError: naming every entry that is not of this form.

    Examples:
        >>> meta = [{"start_step": 3, "specs": [{"module": "encoder", "frozen": False}]}]
        >>> canonical_freeze_meta(read_freeze_meta(meta)) == meta
        True
    """
    if not isinstance(meta, list | tuple):
        raise ConfigError(f"Freeze stages must be a list, got {meta!r}.")
    problems: list[str] = []
    stages = []
    for index, stage in enumerate(meta):
        where = f"stage {index}"
        if wrong := _wrong_keys(stage, _STAGE_KEYS, where):
            problems.append(wrong)
            continue
        listed = stage["specs"] if isinstance(stage["specs"], list | tuple) else []
        specs: Any = [
            _build(FreezeSpec, s, _SPEC_KEYS, f"{where}, spec {i}", problems)
            for i, s in enumerate(listed)
        ]
        if None not in specs:
            given = {
                "start_step": stage["start_step"],
                "specs": tuple(specs) if specs else stage["specs"],
            }
            stages.append(_build(FreezeStage, given, _STAGE_KEYS, where, problems))
    if problems:
        raise ConfigError(f"Freeze stages: {'; '.join(problems)}.")
    return in_order(stages)


def _wrong_keys(given: Any, keys: tuple[str, ...], where: str) -> str | None:
    if isinstance(given, Mapping) and set(given) == set(keys):
        return None
    got = (
        f"the keys {', '.join(map(str, given)) or 'none'}" if isinstance(given, Mapping) else repr(given)
    )
    return f"{where} must have the keys {' and '.join(keys)}, got {got}"


def _build(kind: Any, given: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> Any:
    wrong = _wrong_keys(given, keys, where)
    if wrong is None:
        try:
            return kind(**given)
        except ValueError as error:
            wrong = f"{where}: {str(error).rstrip('.')}"
    problems.append(wrong)
    return None
