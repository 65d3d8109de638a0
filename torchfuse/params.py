"""Which parameters fusion added, which of all train, and in which group.

A module says what fusion added by a method ``fusion_params()`` that names parameters relative to
itself; ``register_fusion_module`` gives any module that method. Everything here goes by the
identity of parameters and reports canonical names, so that it says the same before and after
``torch.compile``, activation checkpointing and sharding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchfuse.naming import canonical_name, named_parameters, unwrap

__all__ = [
    "Description",
    "PartSummary",
    "describe",
    "fusion_buffers",
    "get_fusion_params",
    "param_groups",
    "partition",
    "parts_of",
    "quantized_dtype",
    "register_fusion_module",
    "set_trainable",
]


def register_fusion_module(module: nn.Module) -> None:
    """Mark every parameter of a module as added by fusion, by giving it ``fusion_params()``.

    The module can still be pickled, copied, compiled, checkpointed and sharded.

    Args:
        module: a layer or a whole model, for example a projection behind an encoder.

    Examples:
        >>> projection = nn.Linear(3, 5)
        >>> register_fusion_module(projection)
        >>> sorted(get_fusion_params(nn.Sequential(nn.Linear(2, 3), projection)))
        ['1.bias', '1.weight']
    """
    # A partial over a module-level function pickles and copies with the module it belongs to.
    module.fusion_params = functools.partial(_all_parameter_names, module)  # type: ignore[assignment]


def _all_parameter_names(module: nn.Module) -> list[str]:
    return [canonical_name(name) for name, _ in module.named_parameters()]


def get_fusion_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that fusion added, by canonical name, in the order of ``named_parameters``.

    Args:
        model: any module with parts that have ``fusion_params()``.

    Raises:
        ValueError: if a ``fusion_params()`` names a parameter that its module does not have.
    """
    fusion = _fusion_ids(model)
    return {name: p for name, p in named_parameters(model) if id(p) in fusion}


def _fusion_ids(model: nn.Module) -> set[int]:
    found: set[int] = set()
    for name, module in model.named_modules():
        if not _owns_fusion_params(module):
            continue
        own = dict(named_parameters(module))
        named = [canonical_name(n) for n in module.fusion_params()]
        unknown = [n for n in named if n not in own]
        if unknown:
            raise ValueError(
                f"fusion_params() of {type(module).__name__} {canonical_name(name)!r} names "
                f"{', '.join(unknown)}, which it does not have; it has {', '.join(own) or 'none'}."
            )
        found.update(id(own[n]) for n in named)
    return found


def _owns_fusion_params(module: nn.Module) -> bool:
    # Wrappers forward attributes of what they wrap; only the module's own method counts.
    own = vars(module).get("fusion_params") or getattr(type(module), "fusion_params", None)
    return callable(own)


def fusion_buffers(model: nn.Module) -> dict[str, Any]:
    """Persistent buffers of modules whose parameters were all added by fusion, by canonical name."""
    fusion = _fusion_ids(model)
    inside: set[int] = set()
    for module in model.modules():
        own = list(module.parameters())
        if own and all(id(p) in fusion for p in own):
            inside.update(id(m) for m in module.modules())
    return {
        canonical_name(f"{name}.{key}" if name else key): buffer
        for name, module in unwrap(model).named_modules()
        if id(module) in inside
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set
    }


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The pretrained parts of a model by name; a model that does not name any is all decoder."""
    inner = unwrap(model)
    parts = getattr(inner, "parts", None)
    return parts() if callable(parts) else {"decoder": inner}


def partition(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter of a model in exactly one part.

    Returns:
        ``"decoder"``, ``"encoder"`` (or ``"encoder.<name>"`` for each named encoder) and
        ``"fusion"``, each with its parameters by canonical name. What fusion added is ``"fusion"``
        wherever it stands.
    """
    fusion = _fusion_ids(model)
    parts = parts_of(model)
    owner = {
        id(p): part for part, module in parts.items() if part != "decoder" for p in module.parameters()
    }
    result: dict[str, dict[str, nn.Parameter]] = {part: {} for part in [*parts, "fusion"]}
    for name, parameter in named_parameters(model):
        part = "fusion" if id(parameter) in fusion else owner.get(id(parameter), "decoder")
        result[part][name] = parameter
    return result


def set_trainable(
    model: nn.Module,
    *,
    decoder: bool = False,
    encoder: bool | Mapping[str, bool] = False,
    fusion: bool = True,
) -> None:
    """Choose what trains; everything else is frozen.

    Args:
        model: a fused model.
        decoder: whether the pretrained decoder trains.
        encoder: whether the pretrained encoders train; for named encoders also ``{name: bool}``,
            where a name left out is frozen.
        fusion: whether what fusion added trains, wherever it stands.

    Raises:
        ValueError: if something is to train that the model does not have, or that is quantized; nothing
            has changed then.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> model = nn.Sequential(FusionEmbedding(11, 2, 3), nn.Linear(3, 11))
        >>> set_trainable(model)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.fusion_embedding.weight']
    """
    groups = partition(model)
    wanted = _wanted(groups, decoder=decoder, encoder=encoder, fusion=fusion)
    quantized = [
        name
        for part, train in wanted.items()
        for name, parameter in groups.get(part, {}).items()
        if train and quantized_dtype(parameter) is not None
    ]
    if quantized:
        more = f" and {len(quantized) - 8} more" if len(quantized) > 8 else ""
        raise ValueError(
            f"Quantized weights cannot train: {', '.join(quantized[:8])}{more}. Leave their part frozen."
        )
    empty = [part for part, train in wanted.items() if train and not groups.get(part)]
    if empty:
        there = ", ".join(part for part, parameters in groups.items() if parameters)
        raise ValueError(
            f"Nothing to train in {', '.join(empty)}: the model has no such parameters. "
            f"It has {there or 'none at all'}."
        )
    for part, parameters in groups.items():
        for parameter in parameters.values():
            parameter.requires_grad_(wanted[part])
    inner = unwrap(model)
    if hasattr(inner, "parts"):
        inner.train(inner.training)  # a fused model keeps what is frozen in evaluation mode


def _wanted(
    groups: Iterable[str], *, decoder: bool, encoder: bool | Mapping[str, bool], fusion: bool
) -> dict[str, bool]:
    encoders = [part for part in groups if part.split(".")[0] == "encoder"]
    wanted = {"decoder": decoder, "fusion": fusion}
    if isinstance(encoder, Mapping):
        by_name = {
            part.removeprefix("encoder").removeprefix(".") or "encoder": part for part in encoders
        }
        unknown = sorted(set(encoder) - set(by_name))
        if unknown:
            raise ValueError(
                f"No encoder named {', '.join(unknown)}; there are {', '.join(by_name) or 'none'}."
            )
        return wanted | {part: bool(encoder.get(name, False)) for name, part in by_name.items()}
    if encoder and not encoders:
        raise ValueError("The encoder is to train, but the model has none.")
    return wanted | dict.fromkeys(encoders, encoder)


def quantized_dtype(tensor: Any) -> str | None:
    """What a quantized tensor holds its values in: ``"int8"``, ``"float8_e4m3fn"``, ``"nf4"``.

    Args:
        tensor: any tensor or parameter.

    Returns:
        None if its values are held in its own dtype.
    """
    inner = tensor
    while hasattr(inner, "__tensor_flatten__"):
        if type(inner).__name__ == "NF4Tensor":
            return "nf4"  # two to a byte; what holds them says less
        held = [getattr(inner, name) for name in inner.__tensor_flatten__()[0]]
        inner = max((t for t in held if isinstance(t, Tensor)), key=lambda t: t.nbytes)
    return None if inner.dtype == tensor.dtype else _dtype_name(inner)


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def param_groups(
    model: nn.Module,
    *,
    lr: float | Mapping[str, float],
    weight_decay: float | Mapping[str, float] = 0.0,
) -> list[dict[str, Any]]:
    """Optimizer groups of all trainable parameters: named, disjoint and complete.

    Args:
        model: a fused model.
        lr: one learning rate, or one for each trainable part by its name (``"decoder"``,
            ``"encoder"``, ``"encoder.<name>"``, ``"fusion"``).
        weight_decay: likewise; a part left out of a mapping has none.

    Returns:
        ``{"name", "params", "param_names", "lr", "weight_decay"}`` for each part that trains.

    Raises:
        ValueError: if nothing trains, a part that trains has no learning rate, or a mapping names a
            part that does not train.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> model = FusionEmbedding(11, 2, 3)
        >>> [(g["name"], g["lr"]) for g in param_groups(model, lr={"fusion": 1e-3, "decoder": 1e-5})]
        [('decoder', 1e-05), ('fusion', 0.001)]
    """
    trainable = {
        part: {name: p for name, p in parameters.items() if p.requires_grad}
        for part, parameters in partition(model).items()
    }
    trainable = {part: parameters for part, parameters in trainable.items() if parameters}
    if not trainable:
        raise ValueError("No parameter trains; choose what does with set_trainable.")
    for what, values in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(values, Mapping):
            unknown = sorted(set(values) - set(trainable))
            lacking = sorted(set(trainable) - set(values)) if what == "lr" else []
            if unknown or lacking:
                raise ValueError(
                    f"{what} must name the parts that train, {', '.join(trainable)}; "
                    f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(lacking) or 'none'}."
                )
    return [
        {
            "name": part,
            "params": list(parameters.values()),
            "param_names": list(parameters),
            "lr": lr[part] if isinstance(lr, Mapping) else lr,
            "weight_decay": weight_decay.get(part, 0.0)
            if isinstance(weight_decay, Mapping)
            else weight_decay,
        }
        for part, parameters in trainable.items()
    ]


@dataclass(frozen=True)
class PartSummary:
    """One part of a model in numbers."""

    part: str
    tensors: int
    parameters: int
    trainable: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Description:
    """What a model is made of and what of it trains; prints as a table."""

    parts: tuple[PartSummary, ...]

    def __iter__(self) -> Iterator[PartSummary]:
        return iter(self.parts)

    def __getitem__(self, part: str) -> PartSummary:
        return {row.part: row for row in self.parts}[part]

    def __str__(self) -> str:
        header = ("part", "tensors", "parameters", "trainable", "dtype", "device")
        rows = [
            (r.part, f"{r.tensors:,}", f"{r.parameters:,}", _share(r), r.dtype, r.device)
            for r in self.parts
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if 0 < i < 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in [header, *rows]
        ]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def describe(model: nn.Module) -> Description:
    """A table of the parts of a model: tensors, parameters, what trains, dtype and device.

    Args:
        model: a fused model.

    Returns:
        Rows for every part and a last one, ``"total"``; ``print(describe(model))`` shows them.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> describe(FusionEmbedding(11, 2, 3))["fusion"].parameters
        6
    """
    groups = partition(model)
    rows = [_summary(part, list(parameters.values())) for part, parameters in groups.items()]
    total = _summary("total", [p for parameters in groups.values() for p in parameters.values()])
    return Description((*rows, total))


def _summary(part: str, parameters: list[nn.Parameter]) -> PartSummary:
    return PartSummary(
        part=part,
        tensors=len(parameters),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        dtype=", ".join(sorted({quantized_dtype(p) or _dtype_name(p) for p in parameters})) or "-",
        device=", ".join(sorted({str(p.device) for p in parameters})) or "-",
    )


def _share(row: PartSummary) -> str:
    if not row.trainable:
        return "0"
    return f"{row.trainable:,} ({100 * row.trainable / row.parameters:.1f} %)"
