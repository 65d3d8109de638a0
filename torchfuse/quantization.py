"""Base weights in fewer bits, in place, behind one call.

torchao's tensors go into the linear layers that are there: a module keeps its class and its place, a
parameter its name, and only what it holds is smaller. So no layer is exchanged for a quantized kind of
layer, and nothing that goes by names sees a difference. ``torchao.quantization.quantize_`` works on a
module of ours that is thrown away, because it also leaves attributes behind that cannot be pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.modules.fusion_linear import FusionLinear
from torchfuse.naming import canonical_name, unwrap, unwrap_model
from torchfuse.params import is_sharded, partition, parts_of, quantized_dtype, storage_nbytes

__all__ = ["Quantization", "quantize"]

Scheme = Literal["int8_weight_only", "int8_dynamic", "float8_weight_only", "nf4"]

_NF4_MULTIPLE: Final = 64 * 256  # torchao's block of values times its block of scales
_MIN_DYNAMIC_WIDTH: Final = 16  # torchao leaves what is not wider alone
_PLAIN_FORWARDS: Final = (nn.Linear.forward, FusionLinear.forward)
_LISTED: Final = 8


@dataclass(frozen=True)
class Quantization:
    """What ``quantize`` did; prints as a few lines.

    Attributes:
        scheme: how.
        quantized: names of the weights that are quantized now.
        kept: names of the matrices of the same parts that are as they were, and why.
        bytes_before: size of the quantized weights as they were.
        bytes_after: their size now.
    """

    scheme: str
    quantized: tuple[str, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{self.scheme}: {self.bytes_before:,} bytes are {self.bytes_after:,} now; weights "
            f"quantized: {len(self.quantized)}, kept in high precision: {len(self.kept)}"
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.kept.items())])


def quantize(
    model: nn.Module,
    scheme: Scheme,
    *,
    parts: str | Sequence[str] = ("decoder",),
    fusion: bool = False,
) -> Quantization:
    """Hold the weights of a model's pretrained linear layers in fewer bits, in place.

    Names, modules and everything that fusion added stay as they are, and fusion can be trained, saved
    and loaded over the quantized base. An output head with a weight of its own is quantized (of a
    ``FusionLinear`` the pretrained rows). Embeddings stay, and with them a head that is tied to one; so
    do layers with a forward of their own, torchtune's LoRA layers (build those with ``quantize_base``),
    and shapes that the scheme cannot hold. What stayed is in the result.

    Without ``torch.compile`` a weight is widened again at each call, which saves memory and costs time.
    Convert the model to its dtype and load its pretrained parts first: quantized weights cannot be
    loaded into. A checkpoint of a quantized model is read by ``torch.load(..., weights_only=True)`` once
    ``torchao.quantization`` has been imported, and goes into a model by
    ``load_state_dict(..., assign=True)``.

    Args:
        model: a fused model, or a decoder alone, whose weights to be quantized are frozen.
        scheme: ``"int8_weight_only"``: a scale for each row, computation in the model's dtype.
            ``"int8_dynamic"``: inputs are rounded to int8 too, token by token; it has no gradient, so
            nothing may train; only layers wider than 16. ``"float8_weight_only"``: as the first, in
            ``float8_e4m3fn``. ``"nf4"``: QLoRA's 4 bits, 64 values to a scale; only weights with a
            multiple of 16384 values, which is what torchao can copy.
        parts: whose layers: ``"decoder"``, ``"encoder"`` (all of them) or ``"encoder.<name>"``.
        fusion: whether linear layers that fusion added are quantized as well.

    Returns:
        Which weights were quantized, which stayed and why, and what was saved.

    Raises:
        ModelError: for an unknown scheme or part, a part without any layer to quantize, weights that
            train, are quantized already, sharded or on the meta device, all named; if the scheme does
            not run on the model's device in its dtype, with those that do. Nothing has changed then.

    Examples:
        >>> layer = nn.Linear(17, 5).requires_grad_(False)
        >>> print(quantize(layer, "int8_weight_only"))
        int8_weight_only: 340 bytes are 105 now; weights quantized: 1, kept in high precision: 0
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """
    model = unwrap_model(model)
    groups = partition(model)
    wanted = _wanted_parts(scheme, (parts,) if isinstance(parts, str) else tuple(parts), fusion, groups)
    plan = _plan(model, scheme, {part: groups[part] for part in wanted})
    plan.refuse_problems(scheme)
    weights = [linears[0].weight for linears in plan.linears.values()]
    before, after = sum(weight.nbytes for weight in weights), 0
    with torch.inference_mode(False):  # what is made in it could not be trained over
        _refuse_device(scheme, model, weights)
        del weights  # each may go as soon as it is replaced
        for linears in plan.linears.values():
            quantized = nn.Parameter(_convert(linears[0].weight.detach(), scheme), requires_grad=False)
            for linear in linears:
                linear.weight = quantized
            after += storage_nbytes(quantized)
    return Quantization(scheme, tuple(plan.linears), plan.kept, before, after)


def _wanted_parts(
    scheme: str, parts: tuple[str, ...], fusion: bool, groups: Mapping[str, Any]
) -> list[str]:
    problems = []
    if scheme not in get_args(Scheme):
        problems.append(f"no scheme {scheme!r}; there are {', '.join(get_args(Scheme))}")
    there = [part for part in groups if part != "fusion"]
    wanted = []
    for part in parts:
        found = [p for p in there if p == part or (part == "encoder" and p.startswith("encoder."))]
        if not found:
            problems.append(f"no part {part!r}; the model has {', '.join(there)}")
        wanted += found
    wanted += ["fusion"] if fusion else []
    if not wanted and not problems:
        problems.append(f"nothing to quantize: name a part ({', '.join(there)}), or pass fusion=True")
    if problems:
        raise ModelError(f"quantize: {'; '.join(problems)}.")
    return list(dict.fromkeys(wanted))


@dataclass
class _Plan:
    """What is to be quantized, by the name of the weight, what stays, and what is wrong."""

    linears: dict[str, list[nn.Linear]] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)

    def refuse_problems(self, scheme: str) -> None:
        lines = [f"{problem}: {_some(names)}" for problem, names in self.problems.items()]
        if not lines:
            lines = [
                f"{part} has no layer that {scheme} can hold: "
                + (_some(kept, "; ") or "no matrix at all")
                for part, kept in self.empty.items()
            ]
        if lines:
            raise ModelError("Nothing was quantized.\n  " + "\n  ".join(lines))


def _plan(model: nn.Module, scheme: str, groups: Mapping[str, Mapping[str, nn.Parameter]]) -> _Plan:
    plan = _Plan()
    owners = _owners(model)
    heads = (getattr(unwrap(part), "output", None) for part in parts_of(model).values())
    tied = {id(getattr(head, "tied_module", None)) for head in heads}
    adapters = _adapter_parameters(model)
    for part, parameters in groups.items():
        kept, found = {}, False
        for name, parameter in parameters.items():
            if parameter.dim() < 2:
                continue
            modules = owners[id(parameter)]
            why = "an adapter's" if id(parameter) in adapters else _reason_to_keep(modules, tied)
            problem = None if why else _problem(parameter)
            if problem:
                plan.problems.setdefault(problem, []).append(name)
            elif why := why or _misfit(parameter, scheme):
                kept[name] = why
            else:
                plan.linears[name] = [m for m in modules if isinstance(m, nn.Linear)]
            found |= not why
        plan.kept |= kept
        if not found:
            plan.empty[part] = [f"{name} is kept, {why}" for name, why in kept.items()]
    return plan


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter themselves, by its ``id``."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _adapter_parameters(model: nn.Module) -> set[int]:
    """What LoRA and its like added, by torchtune's protocol."""
    found = set()
    for module in model.modules():
        names = getattr(module, "adapter_params", None)
        own = {canonical_name(name): p for name, p in module.named_parameters()} if names else {}
        found |= {id(own[name]) for name in (names() if callable(names) else ()) if name in own}
    return found


def _reason_to_keep(modules: Iterable[nn.Module], tied: set[int]) -> str | None:
    for module in modules:
        kind = type(module).__name__
        if isinstance(module, nn.Embedding):
            return f"{kind}, which the tied head reads" if id(module) in tied else kind
        if not isinstance(module, nn.Linear):
            return f"{kind}, which is no nn.Linear"
        # PyTorch's own attention reads the weight of its NonDynamicallyQuantizableLinear by itself.
        reads_itself = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if reads_itself or type(module).forward not in _PLAIN_FORWARDS:
            # A weight that is quantized in a layer made for that is refused as any other.
            return None if quantized_dtype(module.weight) else f"{kind}, which has a forward of its own"
    return None


def _problem(weight: nn.Parameter) -> str | None:
    if quantized_dtype(weight) is not None:
        return "quantized already"
    if is_sharded(weight):
        return "sharded (quantize first)"
    if weight.is_meta:
        return "on the meta device (load its values first)"
    if weight.requires_grad:
        return "trains, which a quantized weight cannot (freeze it: set_trainable, requires_grad_)"
    return None


def _misfit(weight: Tensor, scheme: str) -> str | None:
    shape = list(weight.shape)
    if scheme == "nf4" and weight.numel() % _NF4_MULTIPLE:
        return f"{shape} is no multiple of {_NF4_MULTIPLE} values"
    if scheme == "int8_dynamic" and weight.shape[1] <= _MIN_DYNAMIC_WIDTH:
        return f"{shape} is not wider than {_MIN_DYNAMIC_WIDTH}"
    return None


def _refuse_device(scheme: Scheme, model: nn.Module, weights: Iterable[Tensor]) -> None:
    problems = []
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    for device, dtype in dict.fromkeys((weight.device, weight.dtype) for weight in weights):
        outcome = _try(scheme, device, dtype)
        where = f"on {device} in {str(dtype).removeprefix('torch.')}"
        if isinstance(outcome, Exception):
            other = [s for s in get_args(Scheme) if not isinstance(_try(s, device, dtype), Exception)]
            reason = f"{type(outcome).__name__}: {outcome}".partition("\n")[0]
            problems.append(
                f"{scheme} does not run {where} ({reason}); there run {', '.join(other) or 'none'}"
            )
        elif not outcome and trains:
            problems.append(
                f"{scheme} has no gradient, so nothing below it would train as it should: "
                f"{_some(trains)} (set_trainable(model, fusion=False), or take int8_weight_only)"
            )
    if problems:
        raise ModelError("Nothing was quantized.\n  " + "\n  ".join(dict.fromkeys(problems)))


def _try(scheme: str, device: torch.device, dtype: torch.dtype) -> bool | Exception:
    """Run a small layer: whether it has a gradient, or what went wrong."""
    try:
        weight = torch.linspace(-1, 1, _NF4_MULTIPLE, device=device, dtype=dtype).reshape(-1, 64)
        layer = nn.Linear(64, len(weight), device="meta")  # which draws no random numbers
        layer.weight = nn.Parameter(_convert(weight, scheme), requires_grad=False)
        layer.bias = nn.Parameter(weight[:, 0].clone(), requires_grad=False)
        with torch.enable_grad():
            x = weight[:3].clone().requires_grad_()
            total = layer(x).sum()
            if total.requires_grad:
                torch.autograd.grad(total, x)
        total.item()  # waits for the device, which reports late
    except Exception as error:  # whatever a library says of a device that it does not know
        return error
    return total.requires_grad


def _convert(weight: Tensor, scheme: str) -> Tensor:
    """A weight as a scheme holds it."""
    from torchao.dtypes.nf4tensor import to_nf4
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    if scheme == "nf4":
        return to_nf4(weight.contiguous())
    # Settings of inductor are the whole process's, not a model's.
    configs = {
        "int8_weight_only": Int8WeightOnlyConfig(version=2, set_inductor_config=False),
        # Version 2 rounds inputs in bf16 to multiples of 1/128 at best, for the reason given below.
        "int8_dynamic": Int8DynamicActivationInt8WeightConfig(version=1, set_inductor_config=False),
        "float8_weight_only": Float8WeightOnlyConfig(set_inductor_config=False),
    }
    carrier = nn.Linear(1, 1, bias=False, device="meta")
    # Int8Tensor's scale is never below the epsilon of the dtype it is computed in: of bf16 that is
    # more than most rows need, and would leave them 4 bits.
    values = weight.float() if scheme == "int8_weight_only" else weight
    carrier.weight = nn.Parameter(values, requires_grad=False)
    quantize_(carrier, configs[scheme])
    held: Any = carrier.weight.detach()
    if held.dtype != weight.dtype:
        held = type(held)(held.qdata, held.scale.to(weight.dtype), held.block_size, weight.dtype)
    return held


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = len(names) - _LISTED
    return separator.join([*names[:_LISTED], *([f"and {more} more"] if more > 0 else [])])
