"""Quantization of pretrained linear layers, in place.

A weight is replaced by one of torchao's tensors; its layer is not. Modules keep their class and their
place, parameters keep their names, and only their storage becomes smaller, so that nothing that works by
name is affected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.naming import unwrap_model
from torchfuse.params import LORA, partition, storage_nbytes
from torchfuse.quantization.plan import first_names, make_plan
from torchfuse.quantization.schemes import Scheme, convert, try_scheme

__all__ = ["Quantization", "quantize"]


@dataclass(frozen=True)
class Quantization:
    """The result of ``quantize``; prints as a few lines.

    Attributes:
        scheme: the scheme.
        quantized: names of the weights that were quantized.
        kept: names of the matrices of the same parts that were not, each with the reason.
        bytes_before: size of the quantized weights before.
        bytes_after: their size after.
    """

    scheme: str
    quantized: tuple[str, ...]
    kept: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{self.scheme}: {self.bytes_before:,} bytes before, {self.bytes_after:,} after; weights "
            f"quantized: {len(self.quantized)}, kept in high precision: {len(self.kept)}"
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.kept.items())])


def quantize(
    model: nn.Module,
    scheme: Scheme,
    *,
    parts: str | Sequence[str] = ("decoder",),
    fusion: bool = False,
    head: bool = True,
) -> Quantization:
    """Quantize the weights of a model's pretrained linear layers in place.

    Names, modules and everything that fusion added stay the same, and fusion can be trained, saved and
    loaded over the quantized base. An output head with a weight of its own is quantized (of a
    ``FusionLinear`` the pretrained rows). Not quantized are embeddings, a head that is tied to one,
    layers with a forward of their own, LoRA layers (``add_lora`` quantizes their base) and shapes that
    the scheme does not support; the result lists them. Rows of zeros stay zero.

    Without ``torch.compile`` a weight is dequantized at each call, which saves memory and costs time.
    Convert the model to its dtype and load its pretrained parts first: nothing can be loaded into
    quantized weights. A checkpoint of a quantized model is read, with the version of torchao that wrote
    it, by ``torch.load(..., weights_only=True)`` after ``import torchao.quantization``, and loaded by
    ``load_state_dict(..., assign=True)``.

    Args:
        model: a fused model, or a decoder alone, whose weights to be quantized are frozen.
        scheme: ``"int8_weight_only"``: one scale a row, computation in the model's dtype.
            ``"int8_dynamic"``: inputs are rounded to int8 too, token by token; it has no gradient, so
            nothing may be trainable; only layers wider than 16. ``"float8_weight_only"``: as the first,
            in ``float8_e4m3fn``. ``"nf4"``: QLoRA's 4 bits, 64 values to a scale; only weights with a
            multiple of 16384 values, because torchao cannot copy others.
        parts: the parts whose layers are quantized: ``"decoder"``, ``"encoder"`` (all of them) or
            ``"encoder.<name>"``.
        fusion: whether linear layers that fusion added are quantized too.
        head: whether output heads with weights of their own are quantized too.

    Returns:
        The weights that were quantized, those that were kept with the reason, and the sizes.

    Raises:
        ConfigError: for an unknown scheme or part.
        ModelError: for a part without any layer to quantize; for weights that are trainable, already
            quantized, sharded or on the meta device; if the scheme does not run on the model's device in
            its dtype. In both cases the model is unchanged.

    Examples:
        >>> layer = nn.Linear(17, 5).requires_grad_(False)
        >>> print(quantize(layer, "int8_weight_only"))
        int8_weight_only: 340 bytes before, 105 after; weights quantized: 1, kept in high precision: 0
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """
    model = unwrap_model(model)
    groups = partition(model)
    names = _selected_parts(scheme, (parts,) if isinstance(parts, str) else tuple(parts), fusion, groups)
    plan = make_plan(model, scheme, {name: groups[name] for name in names}, head=head)
    plan.raise_problems(scheme)
    weights = [linears[0].weight for linears in plan.linears.values()]
    before, after = sum(weight.nbytes for weight in weights), 0
    with torch.inference_mode(False):  # autograd cannot save tensors that are created in it
        _check_device(scheme, model, weights)
        del weights  # so that each is freed as soon as it is replaced
        for linears in plan.linears.values():
            quantized = nn.Parameter(convert(linears[0].weight.detach(), scheme), requires_grad=False)
            for linear in linears:
                linear.weight = quantized
            after += storage_nbytes(quantized)
    return Quantization(scheme, tuple(plan.linears), plan.kept, before, after)


def _selected_parts(
    scheme: str, parts: tuple[str, ...], fusion: bool, groups: Mapping[str, Any]
) -> list[str]:
    problems = []
    if scheme not in get_args(Scheme):
        problems.append(f"no scheme {scheme!r}; there are {', '.join(get_args(Scheme))}")
    available = [part for part in groups if part != "fusion" and part.split(".")[0] != LORA]
    selected = []
    for part in parts:
        found = [p for p in available if p == part or (part == "encoder" and p.startswith("encoder."))]
        if not found:
            problems.append(f"no part {part!r}; the model has {', '.join(available)}")
        selected += found
    selected += ["fusion"] if fusion else []
    if not selected and not problems:
        problems.append(
            f"nothing to quantize: name a part ({', '.join(available)}), or pass fusion=True"
        )
    if problems:
        raise ConfigError(f"quantize: {'; '.join(problems)}.")
    return list(dict.fromkeys(selected))


def _check_device(scheme: Scheme, model: nn.Module, weights: Iterable[Tensor]) -> None:
    problems = []
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    for device, dtype in dict.fromkeys((weight.device, weight.dtype) for weight in weights):
        outcome = try_scheme(scheme, device, dtype)
        where = f"on {device} in {str(dtype).removeprefix('torch.')}"
        if isinstance(outcome, Exception):
            tried = {other: try_scheme(other, device, dtype) for other in get_args(Scheme)}
            run = [other for other, result in tried.items() if not isinstance(result, Exception)]
            reason = f"{type(outcome).__name__}: {outcome}".partition("\n")[0]
            problems.append(
                f"{scheme} does not run {where} ({reason}); schemes that do: {', '.join(run) or 'none'}"
            )
        elif not outcome and trainable:
            problems.append(
                f"{scheme} has no gradient, so that parameters below it cannot be trained: "
                f"{first_names(trainable)} (set_trainable(model, fusion=False), or use int8_weight_only)"
            )
    if problems:
        raise ModelError("Nothing was quantized.\n  " + "\n  ".join(dict.fromkeys(problems)))
