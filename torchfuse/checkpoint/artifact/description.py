"""Descriptions of how a model was fused, which are saved with its tensors and compared by a load.

Shapes of tensors do not show architecture and options. A description also holds the base fingerprint
and, for the record, which parameters were trained, and in which stages.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.artifact.fingerprint import fingerprint, pretrained_tensors
from torchfuse.lora.add import describe_lora, lora_in_words
from torchfuse.modules.adapters.base import Adapter
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import unwrap, unwrap_model
from torchfuse.params import FreezeSpec, FreezeStage, canonical_freeze_meta, partition

__all__ = ["adapter_problems", "describe_fusion", "description_problems"]

_FORMAT: Final = 1


def describe_fusion(
    model: nn.Module,
    without: Collection[str] = (),
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> dict[str, Any]:
    """Describe a model for an artifact.

    On a sharded model every rank calls this, and all get the same result.

    Args:
        model: a fused model.
        without: pretrained parameters that are saved beside the artifact, and so are not in its base.
        stages: the freeze specs and stages by which the model was trained.

    Returns:
        ``format``, ``architecture``, ``options``, ``adapters``, ``fusion_head`` and ``lora``, which a
        load compares with the model's, as it does ``base``, the shape, dtype and hash of sampled values
        of each pretrained tensor by name. For the record: ``trainable``, for each part whether it trains
        or is saved beside the artifact, or the names of those of its parameters that do; ``freeze``,
        the stages in their order, for ``read_freeze_meta``.
    """
    base = fingerprint(pretrained_tensors(model, without))
    return {
        **_fusion_options(model),
        "trainable": {part: _trainable(params, without) for part, params in partition(model).items()},
        "freeze": canonical_freeze_meta(stages),
        "base": {name: tensor._asdict() for name, tensor in base.items()},
    }


def description_problems(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """List the differences between a description and how a model was fused.

    The base is not compared here (see ``fingerprint``). An option that is None on either side follows
    from the pretrained layers, and is not compared.

    Args:
        saved: what ``describe_fusion`` returned, after a round trip through JSON.
        model: a fused model.
    """
    own = json.loads(json.dumps(_fusion_options(model)))
    problems = [
        f"{name} {saved.get(name)!r}, the model's is {own[name]!r}"
        for name in ("format", "architecture")
        if saved.get(name) != own[name]
    ]
    if problems:
        return problems
    problems = [
        f"{name} {was!r}, the model's is {now!r}"
        for name, was, now in _common(saved.get("options"), own["options"])
        if was != now and None not in (was, now)
    ]
    head = saved.get("fusion_head", own["fusion_head"])
    if head != own["fusion_head"]:
        problems.append(f"fusion_head {head!r}, the model's is {own['fusion_head']!r}")
    lora = saved.get("lora", [])
    if lora != own["lora"]:
        problems.append(
            f"LoRA {lora_in_words(lora)}, the model's is {lora_in_words(own['lora'])}; load_lora adds "
            "the layers that an artifact describes"
        )
    return problems + adapter_problems(saved, model)


def adapter_problems(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """List the differences between the adapters in a description and a model's.

    Adapters that are not registered are not compared; their shapes are, by whatever loads them.

    Args:
        saved: as for ``description_problems``.
        model: a fused model.
    """
    own = json.loads(json.dumps(_adapters(model)))
    return [
        f"{key} {value!r} of the adapter of {name!r}, the model's is {adapter.get(key)!r}"
        for name, described, adapter in _common(saved.get("adapters"), own)
        if isinstance(described, dict) and adapter is not None
        for key, value in described.items()
        if value != adapter.get(key) and None not in (value, adapter.get(key, ""))
    ]


def _common(saved: Any, own: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the names in both sections, with their values."""
    section = saved if isinstance(saved, dict) else {}
    return [(name, section[name], value) for name, value in own.items() if name in section]


def _adapters(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """Return name and options of each encoder's adapter; None if it is not registered."""
    owner: Any = unwrap_model(model)
    found: dict[str, dict[str, Any] | None] = {}
    for name in getattr(owner, "encoder_names", ()):
        adapter = owner.get_adapter(name)
        inner = None if adapter is None else unwrap(adapter)
        found[name] = None
        if isinstance(inner, Adapter) and inner.name is not None:
            found[name] = {"name": inner.name, **inner.options()}
    return found


def _fusion_options(model: nn.Module) -> dict[str, Any]:
    """Return how a model was fused, as far as the shapes of its tensors do not show it."""
    owner: Any = unwrap_model(model)
    strategy = getattr(owner, "strategy", None)
    options = {} if strategy is None else strategy.options()
    encoders = getattr(owner, "encoder_names", ())
    if len(encoders) > 1 and strategy is not None and strategy.extra_tokens(1):
        options["order"] = list(encoders)  # the order of prefixes decides what attends to what
    head = getattr(owner, "output", None)
    return {
        "format": _FORMAT,
        "architecture": None if strategy is None else strategy.arch,
        "options": options,
        "adapters": _adapters(model),
        "fusion_head": isinstance(head, FusionLinear | TiedFusionLinear),
        "lora": describe_lora(model),
    }


def _trainable(parameters: Mapping[str, nn.Parameter], kept: Collection[str]) -> bool | list[str]:
    names = [name for name, p in parameters.items() if p.requires_grad or name in kept]
    return names if 0 < len(names) < len(parameters) else bool(names)
