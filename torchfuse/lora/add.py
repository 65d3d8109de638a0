"""LoRA layers in a model: added by part and name, described, added again from a description."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.lora.layers import LoraSettings, build_layer, has_zero_row, lora_layers, settings_of
from torchfuse.lora.targets import Place, find_layers, find_targets
from torchfuse.quantization import quantize
from torchfuse.quantization.plan import first_names

__all__ = ["add_described_lora", "add_lora", "checked_settings", "describe_lora", "lora_in_words"]


def add_lora(
    model: nn.Module,
    *,
    parts: str | Sequence[str] = ("decoder",),
    rank: int,
    alpha: float,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
    dora: bool = False,
    quantize_base: bool = False,
) -> list[str]:
    """Add LoRA to linear layers of a model, in place, by torchtune's ``LoRALinear`` or ``DoRALinear``.

    The layers keep their parameters, under their names; these are frozen. The new ones, beside them, are
    fusion parameters: they train, ``describe`` and ``param_groups`` list them as ``"lora.<part>"``, and
    everything that saves what fusion added saves them. The model's outputs do not change.

    Load the pretrained parts first if ``dora`` or ``quantize_base``. Several calls with different
    settings may follow each other, for different layers.

    Args:
        model: a fused model, or a decoder alone.
        parts: ``"decoder"``, ``"encoder"`` (all of them), ``"encoder.<name>"``; ``"fusion"``: layers
            that fusion added.
        rank: rows of ``lora_a``.
        alpha: what a layer adds is multiplied by ``alpha / rank``.
        targets: names of layers with any number of the modules that they are in: ``"q_proj"``,
            ``"attn.q_proj"``, ``"layers.3.mlp.w1"``, with the wildcards of ``fnmatch``. None: every
            linear layer inside of the parts' transformer layers, which are the projections of attention
            and the feed-forwards.
        dropout: probability that a value of the input of ``lora_a`` is dropped in training.
        dora: whether the norm of each row of the weight trains too (DoRA).
        quantize_base: whether all linear layers of the parts, except the output head, are quantized to
            NF4 first (QLoRA), see ``quantize``. Layers whose shapes NF4 does not support are kept. Of
            several calls for one part, the first has it.

    Returns:
        The canonical names of the layers that have LoRA now.

    Raises:
        ConfigError: for numbers out of range, an unknown part, and targets without a match, with the
            names of the parts' layers.
        ModelError: naming the layers that cannot have LoRA: those that have it, are quantized other than
            to NF4, are sharded, or share their weight; with ``dora`` those with a row of zeros, by whose
            norm it would divide. In both cases the model is unchanged.

    Examples:
        >>> from torchfuse.models.decoders.llama import llama_decoder
        >>> sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 16}
        >>> model = llama_decoder(vocab_size=11, num_layers=2, max_seq_len=16, **sizes)
        >>> add_lora(model, rank=3, alpha=6, targets=["q_proj"])
        ['layers.0.attn.q_proj', 'layers.1.attn.q_proj']
        >>> [n for n, p in model.layers[0].attn.q_proj.named_parameters() if p.requires_grad]
        ['lora_a.weight', 'lora_b.weight']
    """
    parts = [parts] if isinstance(parts, str) else list(parts)
    if isinstance(targets, str):
        targets = [targets]
    settings = checked_settings(rank, alpha, dropout, dora)
    places = find_targets(model, parts, targets)
    by_name = {place.name: settings for place in places}
    _check_rows(places, by_name)
    if quantize_base:
        if "fusion" in parts:
            raise ConfigError("LoRA: quantize_base is for pretrained parts, and parts has 'fusion'.")
        quantize(model, "nf4", parts=parts, head=False)
    return _replace(places, by_name)


def describe_lora(model: nn.Module) -> list[dict[str, Any]]:
    """Return the LoRA layers of a model, in JSON's types, for ``add_described_lora``.

    Returns:
        ``rank``, ``alpha``, ``dropout``, ``dora`` and ``layers``, the canonical names of the layers that
        have these settings; one entry for each combination of settings.
    """
    by_settings: dict[LoraSettings, list[str]] = {}
    for name, layer in lora_layers(model):
        by_settings.setdefault(settings_of(layer), []).append(name)
    return [{**asdict(settings), "layers": names} for settings, names in by_settings.items()]


def add_described_lora(model: nn.Module, described: Iterable[Mapping[str, Any]]) -> list[str]:
    """Add the LoRA layers that a description names.

    Args:
        model: a model that has the layers, without LoRA.
        described: what ``describe_lora`` returned, after a round trip through JSON.

    Raises:
        ConfigError: if it is not such a description, or its numbers are out of range.
        ModelError: naming the layers that do not exist or cannot have LoRA.
    """
    settings: dict[str, LoraSettings] = {}
    for group in described:
        try:
            numbers = {**group}
            names = [str(name) for name in numbers.pop("layers")]
            settings |= dict.fromkeys(names, checked_settings(**numbers))
        except (TypeError, KeyError) as error:
            raise ConfigError(f"This does not describe LoRA layers: {group!r:.200}.") from error
    places = find_layers(model, settings)
    _check_rows(places, settings)
    return _replace(places, settings)


def lora_in_words(described: Any) -> str:
    """Return a phrase for what ``describe_lora`` returned, for messages."""
    try:
        each = [
            f"{'DoRA of ' if g['dora'] else ''}rank {g['rank']}, alpha {g['alpha']:g}, dropout "
            f"{g['dropout']:g} in {len(g['layers'])} layers"
            for g in described
        ]
    except (TypeError, KeyError, ValueError):
        return repr(described)[:80]
    return "; ".join(each) or "none"


def checked_settings(
    rank: Any, alpha: Any, dropout: Any = 0.0, dora: Any = False, *, what: str = "LoRA"
) -> LoraSettings:
    """Return settings of LoRA layers.

    Args:
        rank: see ``add_lora``, as for the next three.
        alpha: a number above 0.
        dropout: a number of at least 0 and below 1.
        dora: whether it is DoRA.
        what: where they are from, for the message.

    Raises:
        ConfigError: naming every value that is out of range.
    """
    problems = []
    if type(rank) is not int or rank < 1:
        problems.append(f"rank must be a whole number of at least 1, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        problems.append(f"alpha must be a number above 0, got {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"dropout must be a number of at least 0 and below 1, got {dropout!r}")
    if not isinstance(dora, bool):
        problems.append(f"dora must be true or false, got {dora!r}")
    if problems:
        raise ConfigError(f"{what}: {'; '.join(problems)}.")
    return LoraSettings(rank, alpha, dropout, dora)


def _check_rows(places: Sequence[Place], settings: Mapping[str, LoraSettings]) -> None:
    """Raise a ``ModelError`` if a layer that is to have DoRA has a row of zeros."""
    named = [place.name for place in places if settings[place.name].dora and has_zero_row(place.layer)]
    if named:
        raise ModelError(
            "DoRA divides by the norm of each row, and these layers have rows of zeros; nothing has "
            f"changed. Use LoRA (dora=False), or leave them out of targets: {first_names(named)}."
        )


def _replace(places: Sequence[Place], settings: Mapping[str, LoraSettings]) -> list[str]:
    for place in places:
        linear: Any = place.layer
        linear.requires_grad_(False)
        linear.weight.grad = None
        place.put(build_layer(linear, settings[place.name]))
    return [place.name for place in places]
