"""Which weights of a model are quantized, which are kept, and what prevents it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import nn

from torchfuse.errors import ModelError
from torchfuse.naming import unwrap
from torchfuse.params import is_sharded, parts_of, quantized_dtype
from torchfuse.quantization.schemes import unsupported_shape

__all__ = ["Plan", "first_names", "make_plan"]

_MAX_LISTED: Final = 8


@dataclass
class Plan:
    """The outcome of ``make_plan``.

    Attributes:
        linears: the layers to quantize, by the name of their weight; more than one if they share it.
        kept: the matrices that are kept, by name, and the reason.
        problems: each problem and the names of the weights that have it.
        empty: parts without any layer to quantize, and the matrices that they have.
    """

    linears: dict[str, list[nn.Linear]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)

    def raise_problems(self, scheme: str) -> None:
        """Raise a ``ModelError`` with all problems, or else all empty parts, if there are any."""
        lines = [f"{problem}: {first_names(names)}" for problem, names in self.problems.items()]
        if not lines:
            lines = [
                f"{part} has no layer that {scheme} can quantize: "
                + (first_names(kept, "; ") or "no matrix")
                for part, kept in self.empty.items()
            ]
        if lines:
            raise ModelError("Nothing was quantized.\n  " + "\n  ".join(lines))


def make_plan(
    model: nn.Module,
    scheme: str,
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    *,
    head: bool = True,
) -> Plan:
    """Decide for each matrix of the given parts of a model; nothing is changed.

    Args:
        model: the model.
        scheme: how to quantize.
        groups: the parameters of each part, by name.
        head: whether output heads are quantized too.
    """
    plan = Plan()
    owners = _owners(model)
    heads = [getattr(unwrap(part), "output", None) for part in parts_of(model).values()]
    tied = {id(getattr(head, "tied_module", None)) for head in heads}
    for part, parameters in groups.items():
        kept, found = {}, False
        for name, parameter in parameters.items():
            if parameter.dim() < 2:
                continue
            modules = owners[id(parameter)]
            reason = _reason_to_keep(modules, tied)
            if not (head or reason) and any(module is output for module in modules for output in heads):
                reason = "the output head"
            problem = None if reason else _problem(parameter)
            if problem:
                plan.problems.setdefault(problem, []).append(name)
            elif reason := reason or unsupported_shape(parameter, scheme):
                kept[name] = reason
            else:
                plan.linears[name] = [m for m in modules if isinstance(m, nn.Linear)]
            found |= not reason
        plan.kept |= kept
        if not found:
            plan.empty[part] = [f"{name} is kept ({reason})" for name, reason in kept.items()]
    return plan


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that own each parameter directly, by its ``id``."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _reason_to_keep(modules: Iterable[nn.Module], tied: set[int]) -> str | None:
    for module in modules:
        kind = type(module).__name__
        if isinstance(module, nn.Embedding):
            return f"{kind}, shared with the tied head" if id(module) in tied else kind
        if not isinstance(module, nn.Linear):
            return f"{kind}, not an nn.Linear"
        # nn.MultiheadAttention does not call its out_proj: it passes the weight on.
        bypassed = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if bypassed or not _has_plain_forward(type(module)):
            # A weight that such a layer has quantized itself is an error, as any quantized weight is.
            return None if quantized_dtype(module.weight) else f"{kind}, which has a forward of its own"
    return None


def _has_plain_forward(kind: type[nn.Module]) -> bool:
    # A FusionLinear computes its new rows beside the plain forward.
    return kind.forward is nn.Linear.forward or "extends_linear" in vars(kind)


def _problem(weight: nn.Parameter) -> str | None:
    if quantized_dtype(weight) is not None:
        return "already quantized"
    if is_sharded(weight):
        return "sharded (quantize first)"
    if weight.is_meta:
        return "on the meta device (load its values first)"
    if weight.requires_grad:
        return "trainable, which quantized weights cannot be (freeze: set_trainable, requires_grad_)"
    return None


def first_names(names: Sequence[str], separator: str = ", ") -> str:
    """Join the first names of a long list, and count the others."""
    more = len(names) - _MAX_LISTED
    return separator.join([*names[:_MAX_LISTED], *([f"and {more} more"] if more > 0 else [])])
