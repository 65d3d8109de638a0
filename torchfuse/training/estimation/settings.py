"""Settings of a simulated training step, read from a configuration of the finetune recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn

from torchfuse.errors import ConfigError
from torchfuse.lora.layers import is_lora
from torchfuse.models.strategy import features_per_image
from torchfuse.naming import find_model, unwrap
from torchfuse.params import FreezeSchedule, partition, read_freeze_meta
from torchfuse.training.device import dtype_by_name
from torchfuse.training.estimation.meta_model import model_on_meta
from torchfuse.training.estimation.simulate import StepSettings

__all__ = ["read_settings"]

_OF_TRAIN: Final = (
    "batch_size",
    "gradient_accumulation_steps",
    "fp32_weights",
    "optimizer",
    "optimizer_in_backward",
)
_TEXT_OF_AN_IMAGE: Final = 256  # tokens, in packs
_NF4_BLOCK: Final = 64  # values to a scale of one byte; 256 scales have one in fp32
_NF4_NBYTES: Final = 1 / 2 + 1 / _NF4_BLOCK + 4 / (256 * _NF4_BLOCK)


def read_settings(
    config: Mapping[str, Any],
    where: str | Path,
    *,
    seq_len: int | None = None,
    images: int | None = None,
    supervised: float = 1.0,
) -> tuple[nn.Module, StepSettings]:
    """Build the model of a configuration on the meta device, and read how it is trained.

    Args:
        config: the content of a YAML of the finetune recipe, with all of its keys.
        where: its name, for messages.
        seq_len: positions of each row; None: ``data.max_seq_len``, or else the model's.
        images: images of each row; None: 1, or in packs as many as there is space for with 256 tokens
            of text each.
        supervised: share of the positions that are supervised.

    Raises:
        ConfigError: for a section that is wrong.
        CheckpointError: for a directory that is wrong.
    """
    dtype = dtype_by_name(config["dtype"], f"{where}: dtype")
    data, train = config["data"], config["train"]
    model = model_on_meta(config, where, dtype)
    owner: Any = unwrap(find_model(model))
    length = seq_len or data["max_seq_len"] or owner.max_seq_len
    if images is None:
        images = _images_in_pack(owner, length) if data["packed"] else 1
    trained = FreezeSchedule(read_freeze_meta(config["freeze"])).trained_ever(model)
    if not trained:
        raise ConfigError(f"{where}: no parameter trains.")
    given: dict[str, Any] = {key: train[key] for key in _OF_TRAIN}
    cuda = config["device"].startswith("cuda")
    if cuda:
        given["optimizer"] = _as_on_cuda(given["optimizer"])
    return model, StepSettings(
        **given,
        seq_len=length,
        images=images,
        supervised=supervised,
        dtype=dtype,
        trained=frozenset(trained),
        features_cached=data["cache_features"] is not None,
        activation_checkpointing=config["activation_checkpointing"],
        activation_offloading=config["activation_offloading"] and cuda,
        quantized=_nf4_nbytes(owner, config["lora"]),
    )


def _nf4_nbytes(model: Any, lora: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of the weights that a section ``lora`` quantizes, by canonical name."""
    parts = [part for part, section in lora.items() if (section or {}).get("quantize_base")]
    head = getattr(getattr(model, "decoder", model), "output", None)
    linear = {
        id(module.weight)
        for module in model.modules()
        if (isinstance(module, nn.Linear) or is_lora(module)) and module is not head
    }
    return {
        name: round(parameter.numel() * _NF4_NBYTES)
        for part, parameters in partition(model).items()
        for name, parameter in parameters.items()
        if part.partition(".")[0] in parts
        if id(parameter) in linear and parameter.numel() % _NF4_BLOCK == 0
    }


def _images_in_pack(owner: Any, length: int) -> int:
    """Return how many images with their text a pack of a length holds."""
    each = sum(features_per_image(owner, name, one_tile=True) for name in owner.encoder_names)
    in_sequence = owner.strategy.extra_tokens(1) or owner.strategy.special_tokens()
    return max(1, length // (_TEXT_OF_AN_IMAGE + (each if in_sequence else 0)))


def _as_on_cuda(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer that computes on all parameters at once, as torch's own do on CUDA."""
    component = dict(optimizer)
    if (
        str(component.get("_component_")).startswith("torch.optim.")
        and not {"fused", "foreach"} & component.keys()
    ):
        component["foreach"] = True
    return component
