"""The costs of training a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchfuse.naming import unwrap_model
from torchfuse.params import get_fusion_params
from torchfuse.training.record import TrainingRecord

__all__ = ["format_costs", "training_costs"]


def training_costs(model: nn.Module, record: TrainingRecord) -> dict[str, Any]:
    """Return the cost of training a model, and the load of its experts in their last run.

    Args:
        model: the trained model.
        record: of its training.

    Returns:
        ``new_parameters``, ``steps``, ``skipped_steps`` (not finite, or without a
        supervised token), ``training_seconds``, ``tokens`` (by modality), ``tokens_per_second``,
        ``left_out`` (samples: ``skipped``, because they cannot be used, and ``too_long``),
        ``accuracy_at_step`` and the ``statistics`` of the architecture, such as ``expert_load`` for one
        with experts of modalities; all of it JSON.
    """
    costs: dict[str, Any] = {
        "new_parameters": sum(p.numel() for p in get_fusion_params(model).values()),
        "steps": len(record.losses),
        "skipped_steps": record.skipped_steps,
        "training_seconds": round(record.seconds, 1),
        "tokens": dict(record.tokens),
        "tokens_per_second": round(sum(record.tokens.values()) / record.seconds),
        "left_out": {name: record.samples[name] for name in ("skipped", "too_long")},
        "accuracy_at_step": [[step, round(share, 4)] for step, share in record.accuracies],
    }
    strategy = getattr(unwrap_model(model), "strategy", None)
    return costs if strategy is None else costs | strategy.statistics(model)


def format_costs(costs: Mapping[str, Any]) -> str:
    """Return the result of ``training_costs`` as text.

    Examples:
        >>> costs = {"new_parameters": 1234, "steps": 5, "training_seconds": 2.5}
        >>> costs |= {"tokens": {"text": 4100, "image": 900}, "tokens_per_second": 2000}
        >>> costs["left_out"] = {"skipped": 0, "too_long": 12}
        >>> print(format_costs(costs | {"expert_load": {"layers.0": {"image": [0.25, 0.125]}}}))
        trained for 2.5 s, on 4,100 tokens of text and 900 of image: 2,000 a second; 1,234 new parameters
        left out 12 samples that are too long, and 0 that cannot be used
        layers.0: its experts of image took 25%, 12% of the tokens when they last ran
    """
    text, *others = (f"{count:,} tokens of {name}" for name, count in costs["tokens"].items())
    tokens = " and ".join([text, *(other.replace(" tokens", "") for other in others)])
    lines = [
        f"trained for {costs['training_seconds']:,} s, on {tokens}: {costs['tokens_per_second']:,} a "
        f"second; {costs['new_parameters']:,} new parameters"
    ]
    if any((left_out := costs.get("left_out", {})).values()):
        lines.append(
            f"left out {left_out['too_long']:,} samples that are too long, and {left_out['skipped']:,} "
            "that cannot be used"
        )
    for layer, load in costs.get("expert_load", {}).items():
        for name, shares in load.items():
            taken = ", ".join(f"{share:.0%}" for share in shares)
            lines.append(f"{layer}: its experts of {name} took {taken} of the tokens when they last ran")
    return "\n".join(lines)
