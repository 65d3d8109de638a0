"""Choosing what trains, by part and by parameter.

Whether a parameter trains is its ``requires_grad`` and nothing else. When a parameter is frozen its
gradient is set to None: an optimizer skips it, neither updating nor decaying it, and it is not in the
norm of gradients. A module with only frozen parameters stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import distributed, nn

from torchfuse.errors import ConfigError
from torchfuse.naming import ModelWithParts, named_parameters, unwrap_model
from torchfuse.params.parts import LORA, partition
from torchfuse.params.storage import quantized_dtype

__all__ = ["reshard", "set_requires_grad", "set_trainable"]


def set_trainable(
    model: nn.Module,
    *,
    decoder: bool = False,
    encoder: bool | Mapping[str, bool] = False,
    fusion: bool = True,
    lora: bool | None = None,
) -> None:
    """Choose what trains; everything else is frozen.

    Args:
        model: a fused model.
        decoder: whether the pretrained decoder trains.
        encoder: whether the pretrained encoders train; for named encoders also ``{name: bool}``,
            where a name left out is frozen.
        fusion: whether what fusion added trains, inside pretrained parts too.
        lora: whether LoRA layers train. None: as ``fusion``.

    Raises:
        ConfigError: if something is to train that the model does not have, or that is quantized; nothing
            has changed then.
        ModelError: as ``parts_of``.

    Examples:
        >>> from torchfuse import FusionEmbedding
        >>> model = nn.Sequential(FusionEmbedding(11, 2, 3), nn.Linear(3, 11))
        >>> set_trainable(model)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.fusion_embedding.weight']
    """
    groups = partition(model)
    chosen = _chosen_parts(groups, decoder=decoder, encoder=encoder, fusion=fusion, lora=lora)
    quantized = [
        name
        for part, train in chosen.items()
        for name, parameter in groups.get(part, {}).items()
        if train and quantized_dtype(parameter) is not None
    ]
    if quantized:
        more = f" and {len(quantized) - 8} more" if len(quantized) > 8 else ""
        raise ConfigError(
            f"Quantized weights cannot train: {', '.join(quantized[:8])}{more}. Leave their part frozen."
        )
    empty = [part for part, train in chosen.items() if train and not groups.get(part)]
    if empty:
        there = ", ".join(part for part, parameters in groups.items() if parameters)
        raise ConfigError(
            f"Nothing to train in {', '.join(empty)}: the model has no such parameters. "
            f"It has {there or 'none at all'}."
        )
    set_requires_grad(
        model, {n: chosen[part] for part, parameters in groups.items() for n in parameters}
    )


def set_requires_grad(model: nn.Module, trains: Mapping[str, bool]) -> None:
    """Set ``requires_grad`` of parameters by their canonical names; the others stay as they are.

    Args:
        model: any module.
        trains: names of parameters of the model, and whether each trains.
    """
    reshard(model)
    for name, parameter in named_parameters(model):
        if name not in trains:
            continue
        parameter.requires_grad_(trains[name])
        if not trains[name]:
            parameter.grad = None
    inner = unwrap_model(model)
    if isinstance(inner, ModelWithParts):
        inner.train(inner.training)  # a fused model keeps what is frozen in evaluation mode


def reshard(model: nn.Module) -> None:
    """Reshard an FSDP2 model.

    After a forward pass without a backward pass some of its parameters are unsharded copies, which must
    not be given to an optimizer and lose their ``requires_grad`` later.

    Args:
        model: any module; one that is not sharded stays as it is.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _chosen_parts(
    groups: Mapping[str, Mapping[str, nn.Parameter]],
    *,
    decoder: bool,
    encoder: bool | Mapping[str, bool],
    fusion: bool,
    lora: bool | None,
) -> dict[str, bool]:
    encoders = [part for part in groups if part.split(".")[0] == "encoder"]
    adapted = [part for part in groups if part.split(".")[0] == LORA]
    if lora and not adapted:
        raise ConfigError("lora=True, but the model has no LoRA layers. Call add_lora first.")
    # What fusion added may be LoRA alone.
    chosen = {"decoder": decoder, "fusion": fusion and bool(groups["fusion"] or not adapted)}
    chosen |= dict.fromkeys(adapted, fusion if lora is None else lora)
    if isinstance(encoder, Mapping):
        by_name = {
            part.removeprefix("encoder").removeprefix(".") or "encoder": part for part in encoders
        }
        unknown = sorted(set(encoder) - set(by_name))
        if unknown:
            raise ConfigError(
                f"No encoder named {', '.join(unknown)}; there are {', '.join(by_name) or 'none'}."
            )
        return chosen | {part: bool(encoder.get(name, False)) for name, part in by_name.items()}
    if encoder and not encoders:
        raise ConfigError(
            f"encoder=True, but the model has no encoder; it has {', '.join(groups)}. Use encoder=False."
        )
    return chosen | dict.fromkeys(encoders, encoder)
