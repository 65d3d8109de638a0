"""LoRA from the section ``lora`` of a recipe's configuration, by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.lora.add import add_lora, checked_settings

__all__ = ["add_lora_sections", "section_problems"]

_PARTS: Final = ("decoder", "encoder", "fusion")


def section_problems(lora: Mapping[str, Any]) -> Iterator[str]:
    """Yield a phrase for each problem of a section ``lora``."""
    for part, section in lora.items():
        given = [f"lora.{part}.{name}" for name, value in section.items() if value and name != "rank"]
        if section.get("rank") is not None:
            numbers = {name: section[name] for name in ("dropout", "dora") if name in section}
            try:
                checked_settings(section["rank"], _alpha(section), **numbers, what=f"lora.{part}")
            except ConfigError as error:
                yield str(error).rstrip(".")
        elif given:
            yield f"lora.{part}.rank must be given with {', '.join(given)}"


def add_lora_sections(
    model: nn.Module, lora: Mapping[str, Any] | None, *, where: str = "", quantize: bool = True
) -> list[str]:
    """Add LoRA to the parts of a model that a section ``lora`` names.

    Args:
        model: a fused model, with its pretrained parts loaded.
        lora: ``decoder``, ``encoder`` and ``fusion``, each with the keywords of ``add_lora``; without a
            rank, or with null, a part has none. ``alpha`` is twice the rank unless given.
        where: prefix of the section's name in messages.
        quantize: whether ``quantize_base`` is followed; not on the meta device.

    Returns:
        The canonical names of the layers that have LoRA.

    Raises:
        ConfigError: if the section is wrong, or does not fit the model.
    """
    lora = {part: dict(section) for part, section in (lora or {}).items() if section}
    unknown = [repr(part) for part in lora if part not in _PARTS]
    problems = [f"{where}lora has {part}; parts are {', '.join(_PARTS)}" for part in unknown]
    problems += [f"{where}{problem}" for problem in section_problems(lora)]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")
    added = []
    for part in _PARTS:
        section = lora.get(part, {})
        if section.get("rank") is None:
            continue
        options = {**section, "alpha": _alpha(section)}
        options["quantize_base"] = quantize and section.get("quantize_base", False)
        try:
            added += add_lora(model, parts=[part], **options)
        except (ConfigError, ModelError, TypeError) as error:
            raise ConfigError(f"{where}lora.{part}: {error}") from error
    return added


def _alpha(section: Mapping[str, Any]) -> Any:
    alpha = section.get("alpha")
    return 2 * section["rank"] if alpha is None else alpha
