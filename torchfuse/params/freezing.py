"""Freezing by name: an ordered list of specs, where a later one overrides an earlier one.

A spec names a part, a module or a parameter by its canonical name, so that it means the same on a model
that is compiled, activation-checkpointed or sharded. The name of a pretrained module does not include
what fusion added inside it: ``"decoder"``, ``"decoder.layers.3"`` and ``"decoder.layers.*"`` are the
pretrained decoder and layers, and ``"decoder.layers.3.fusion_layer"`` is the new layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, cast

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.naming import canonical_name, unwrap, unwrap_model
from torchfuse.params.parts import partition, parts_of
from torchfuse.params.storage import quantized_dtype
from torchfuse.params.trainable import set_requires_grad

__all__ = ["FreezeSpec", "apply_freeze_specs", "freeze_mask", "freeze_params"]

_WILDCARDS: Final = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class FreezeSpec:
    """Freeze a part of a model, or let it train.

    Args:
        module: a part (``"decoder"``, ``"encoder"``, ``"encoder.<name>"``, ``"adapter"``,
            ``"adapter.<name>"``, ``"fusion"``, ``"lora"``, ``"lora.<part>"``), or the canonical name of
            a module or parameter (``"encoder.layers.11"``, also ``"encoder.<name>.layers.11"``), or such
            a name with the wildcards of ``fnmatch``: ``*`` for anything, dots too, ``?`` and ``[...]``.
            A module includes everything in it, except what was added if it has pretrained parameters
            too.
        frozen: True freezes, False lets train.

    Raises:
        ConfigError: if ``module`` is not a valid name or pattern, or ``frozen`` not a bool.

    Examples:
        >>> FreezeSpec("encoder.layers.*.norm", frozen=True)
        FreezeSpec(module='encoder.layers.*.norm', frozen=True)
        >>> FreezeSpec("encoder.", frozen=True)
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: FreezeSpec: module 'encoder.' has an empty component; ...
    """

    module: str
    frozen: bool

    def __post_init__(self) -> None:
        problems, frozen = list(_pattern_problems(self.module)), cast(object, self.frozen)
        if not isinstance(frozen, bool):
            problems.append(f"frozen must be true (freeze) or false (let train), got {frozen!r}")
        if problems:
            raise ConfigError(f"FreezeSpec: {'; '.join(problems)}.")


def _pattern_problems(pattern: object) -> Iterator[str]:
    example = 'write a name such as "encoder", "encoder.layers.11" or "decoder.layers.*.attn"'
    if not isinstance(pattern, str):
        yield f"module must be a string, got {pattern!r}; {example}"
    elif pattern != pattern.strip():
        yield f"module {pattern!r} has spaces around it; {example}"
    elif not all(pattern.split(".")):
        yield f"module {pattern!r} has an empty component; {example}"
    elif re.search(r"[\[\]]", re.sub(r"\[!?[^\[\]]+\]", "", pattern)):
        yield f"module {pattern!r} has unpaired brackets (a pair is [0-3]); {example}"


def freeze_params(model: nn.Module, *modules: str, frozen: bool = True) -> None:
    """Freeze parts of a model, or let them train; everything else stays as it is.

    Args:
        model: a fused model, or any module.
        *modules: parts, names or patterns, as in ``FreezeSpec``.
        frozen: False lets them train instead.

    Raises:
        ConfigError: as ``apply_freeze_specs``, and if there are no modules.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
        >>> freeze_params(model, "0", "*.bias")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.weight']
    """
    if not modules:
        raise ConfigError('Nothing to freeze: name at least one part or module, such as "encoder".')
    apply_freeze_specs(model, [FreezeSpec(module, frozen) for module in modules])


def apply_freeze_specs(model: nn.Module, specs: Iterable[FreezeSpec]) -> None:
    """Apply specs in their order; parameters that no spec matches stay as they are.

    The gradient of a frozen parameter is set to None, so an optimizer skips it. Apply between two
    optimizer steps, not between two micro-batches of one.

    Args:
        model: a fused model, or any module; compiled, activation-checkpointed and sharded alike.
        specs: a later one overrides an earlier one.

    Raises:
        ConfigError: naming each spec that matches no parameter with the names there are, and each
            parameter that cannot train; nothing has changed then.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5))
        >>> apply_freeze_specs(model, [FreezeSpec("*", True), FreezeSpec("1.bias", False)])
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['1.bias']
    """
    mask, problems = freeze_mask(model, specs)
    if problems:
        raise ConfigError(f"The model cannot be frozen so; nothing has changed: {'; '.join(problems)}.")
    set_requires_grad(model, mask)


def freeze_mask(model: nn.Module, specs: Iterable[FreezeSpec]) -> tuple[dict[str, bool], list[str]]:
    """Return whether each parameter that specs match trains.

    Args:
        model: as for ``apply_freeze_specs``.
        specs: as for ``apply_freeze_specs``.

    Returns:
        Whether it trains, by canonical name; and what is wrong with the specs for this model.
    """
    names = _Names(model)
    mask: dict[str, bool] = {}
    problems: list[str] = []
    for spec in specs:
        matched = names.matched(spec.module)
        if not matched:
            problems.append(f"{spec.module!r} matches no parameter; {names.near(spec.module)}")
        mask |= dict.fromkeys(matched, not spec.frozen)
    unable = [name for name, trains in mask.items() if trains and not _can_train(names.parameters[name])]
    if unable:
        more = f" and {len(unable) - 8} more" if len(unable) > 8 else ""
        problems.append(
            f"quantized weights and integers cannot train, leave them frozen: "
            f"{', '.join(unable[:8])}{more}"
        )
    return mask, problems


def _can_train(parameter: nn.Parameter) -> bool:
    numbers = parameter.is_floating_point() or parameter.is_complex()
    return numbers and quantized_dtype(parameter) is None


class _Names:
    """All names of the parameters of a model: canonical names, and names that begin with a part."""

    def __init__(self, model: nn.Module) -> None:
        inner = unwrap_model(model)
        self.parameters: dict[str, nn.Parameter] = {}
        by_id: dict[int, str] = {}
        for name, parameter in inner.named_parameters():
            self.parameters[canonical_name(name)] = parameter
            by_id[id(parameter)] = canonical_name(name)
        self._paths: dict[str, list[list[str]]] = {name: [] for name in self.parameters}
        self._parts = list(parts_of(model))
        # What was added, with the names of its part.
        self._added = {
            name: _leading(part)
            for part, parameters in partition(model).items()
            if part not in self._parts
            for name in parameters
        }
        # One parameter may be registered in several places, and each place may have two names.
        for prefix, module in [("", inner), *((f"{p}.", m) for p, m in parts_of(model).items())]:
            for name, parameter in unwrap(module).named_parameters(remove_duplicate=False):
                full = prefix + canonical_name(name)
                own = self._paths[by_id[id(parameter)]]
                own.append(_leading(full))
                if full.startswith("adapters."):
                    own.append(_leading(f"adapter.{full.removeprefix('adapters.')}"))
        pretrained = self._paths.keys() - self._added.keys()
        self._pretrained = {path for n in pretrained for own in self._paths[n] for path in own}
        self._all = self._pretrained | {
            path for n in self._added for own in self._paths[n] for path in own
        }

    def matched(self, pattern: str) -> list[str]:
        """Return the canonical names of the parameters that a pattern matches."""
        hits = {path for path in self._all if fnmatchcase(path, pattern)}
        return [
            name
            for name, paths in self._paths.items()
            if any(fnmatchcase(part, pattern) for part in self._added.get(name, ()))
            or any(self._includes(hits, name, own) for own in paths)
        ]

    def _includes(self, hits: set[str], name: str, own: list[str]) -> bool:
        outermost = next((path for path in own if path in hits), None)
        if outermost is None:
            return False
        return name not in self._added or outermost not in self._pretrained

    def near(self, pattern: str) -> str:
        """List the names that exist next to a pattern that matches nothing."""
        above = pattern.split(".")
        while above and (_WILDCARDS.search(".".join(above)) or ".".join(above) not in self._all):
            above.pop()
        where = ".".join([*above, ""])
        below = [path.removeprefix(where) for path in self._all if path.startswith(where)]
        children = sorted({path.split(".")[0] for path in below}, key=_by_number)
        if not above:
            added = [part for parts in self._added.values() for part in parts]
            children = [*dict.fromkeys([*self._parts, *added, *children])]
        shown = ", ".join(children[:12]) + (f" and {len(children) - 12} more" if children[12:] else "")
        return f"{where.rstrip('.') or 'the model'} has {shown or 'nothing in it'}"


def _leading(name: str) -> list[str]:
    """Return ``a``, ``a.b`` and ``a.b.c`` for ``a.b.c``."""
    components = name.split(".")
    return [".".join(components[: n + 1]) for n in range(len(components))]


def _by_number(component: str) -> tuple[int, str]:
    return (int(component) if component.isdecimal() else -1, component)
