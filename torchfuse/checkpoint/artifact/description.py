"""What an artifact says of the model that it is for.

Shapes of tensors do not show how a model was fused: which architecture, with which options. So an
artifact says it, a load compares it, and every difference is named. It also says which base fusion was
trained over (see ``fingerprint``) and, for the record, what of the model trained, and in which stages.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.artifact.fingerprint import fingerprint, pretrained_tensors
from torchfuse.modules.adapters.base import Adapter
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import model_behind, unwrap
from torchfuse.params import FreezeSpec, FreezeStage, canonical_freeze_meta, partition

__all__ = ["adapter_problems", "describe_fusion", "description_problems"]

_FORMAT: Final = 1


def describe_fusion(
    model: nn.Module,
    without: Collection[str] = (),
    stages: Iterable[FreezeSpec | FreezeStage] = (),
) -> dict[str, Any]:
    """What an artifact says of the model that it is for.

    On a sharded model every rank calls this, and all get the same.

    Args:
        model: a fused model.
        without: pretrained parameters that are kept beside the artifact, and so are no part of its base.
        stages: the freeze specs and stages by which the model was trained.

    Returns:
        ``format``, ``architecture``, ``options``, ``adapters`` and ``fusion_head``, which a load
        compares with the model's; ``base``, by name the shape, dtype and hash of sampled values of each
        pretrained tensor, which it compares too; and for the record ``trainable``, for each part
        whether it trains or is kept beside the artifact, or the names of those of its parameters that
        do, and ``freeze``, the stages in their order, for ``read_freeze_meta``.
    """
    base = fingerprint(pretrained_tensors(model, without))
    return {
        **_kind(model),
        "trainable": {part: _trainable(params, without) for part, params in partition(model).items()},
        "freeze": canonical_freeze_meta(stages),
        "base": {name: tensor._asdict() for name, tensor in base.items()},
    }


def description_problems(theirs: Mapping[str, Any], model: nn.Module) -> list[str]:
    """How a model was fused otherwise than a description says, in words.

    The base is not compared here (see ``fingerprint``). An option that is None on either side is as
    the pretrained layers say, and differs from nothing.

    Args:
        theirs: what ``describe_fusion`` returned for the model of an artifact, as a file holds it.
        model: a fused model.
    """
    ours = _kind(model)
    problems = [
        f"{name} {theirs.get(name)!r}, the model's is {ours[name]!r}"
        for name in ("format", "architecture")
        if theirs.get(name) != ours[name]
    ]
    if problems:
        return problems
    options = theirs["options"] if isinstance(theirs.get("options"), dict) else {}
    here = json.loads(json.dumps(ours["options"]))  # as a file holds them
    problems = [
        f"{name} {options[name]!r}, the model's is {here[name]!r}"
        for name in here
        if name in options and options[name] != here[name] and None not in (options[name], here[name])
    ]
    head = theirs.get("fusion_head", ours["fusion_head"])
    if head != ours["fusion_head"]:
        problems.append(f"fusion_head {head!r}, the model's is {ours['fusion_head']!r}")
    return problems + adapter_problems(theirs, model)


def adapter_problems(theirs: Mapping[str, Any], model: nn.Module) -> list[str]:
    """How a model's adapters are others than a description says, in words.

    Adapters that no registry knows have their shapes alone, which are not compared here.

    Args:
        theirs: as for ``description_problems``.
        model: a fused model.
    """
    described = theirs.get("adapters")
    there: dict[str, Any] = described if isinstance(described, dict) else {}
    problems = []
    for name, here in json.loads(json.dumps(_adapters(model))).items():
        known = there.get(name) if here is not None else None
        if known is None:
            continue
        problems += [
            f"{key} {known[key]!r} of the adapter of {name!r}, the model's is {here.get(key)!r}"
            for key in known
            if known[key] != here.get(key) and None not in (known[key], here.get(key, ""))
        ]
    return problems


def _adapters(model: nn.Module) -> dict[str, dict[str, Any] | None]:
    """Name and options of each encoder's adapter; None where no registry knows it."""
    owner: Any = model_behind(model)
    found: dict[str, dict[str, Any] | None] = {}
    for name in getattr(owner, "encoder_names", ()):
        adapter = owner.get_adapter(name)
        inner = None if adapter is None else unwrap(adapter)
        found[name] = None
        if isinstance(inner, Adapter) and inner.name is not None:
            found[name] = {"name": inner.name, **inner.options()}
    return found


def _kind(model: nn.Module) -> dict[str, Any]:
    """How a model was fused, as far as the shapes of its tensors do not show it."""
    strategy = getattr(unwrap(model), "strategy", None)
    options = {} if strategy is None else strategy.options()
    encoders = getattr(unwrap(model), "encoder_names", ())
    if len(encoders) > 1 and strategy is not None and strategy.extra_tokens(1):
        options["order"] = list(encoders)  # in front of the text, whoever stands behind sees more
    head = getattr(unwrap(model), "output", None)
    return {
        "format": _FORMAT,
        "architecture": None if strategy is None else strategy.arch,
        "options": options,
        "adapters": _adapters(model),
        "fusion_head": isinstance(head, FusionLinear | TiedFusionLinear),
    }


def _trainable(parameters: Mapping[str, nn.Parameter], kept: Collection[str]) -> bool | list[str]:
    names = [name for name, p in parameters.items() if p.requires_grad or name in kept]
    return names if 0 < len(names) < len(parameters) else bool(names)
