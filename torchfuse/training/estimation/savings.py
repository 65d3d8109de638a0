"""Which change of a configuration saves how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from torchfuse.errors import ConfigError
from torchfuse.training.estimation.estimate import estimate
from torchfuse.training.estimation.result import Estimate

__all__ = ["savings"]


def savings(config: Mapping[str, Any], base: Estimate, **options: Any) -> Iterator[tuple[str, float]]:
    """Estimate a configuration again with one change at a time.

    Args:
        config: the content of a YAML of the finetune recipe, with all overrides.
        base: its estimate.
        **options: of ``estimate``.

    Yields:
        The change as the command line takes it, and the bytes at the peak with it. Changes that the
        configuration cannot take are left out, such as rows too short for an image.
    """
    # As a key of the configuration, which a change can replace.
    length = options.pop("seq_len", None)
    given = [] if length is None else [f"data.max_seq_len={length}"]
    for change in _changes(config, base):
        try:
            peak = estimate(config, overrides=[*given, *change], **options).peak
        except ConfigError:
            continue
        yield " ".join(change), peak


def _changes(config: Mapping[str, Any], base: Estimate) -> Iterator[Sequence[str]]:
    given = OmegaConf.create(dict(config))

    def value(key: str, default: Any = None) -> Any:
        found = OmegaConf.select(given, key)
        return default if found is None else found

    settings = base.settings
    if not value("activation_checkpointing"):
        yield ["activation_checkpointing=true"]
    if settings.batch_size > 1:
        yield ["train.batch_size=1"]
    if settings.seq_len >= 1024:
        yield [f"data.max_seq_len={settings.seq_len // 2}"]
    if value("dtype", "fp32") == "fp32":
        yield ["dtype=bf16"]
    if value("dtype") == "bf16" and settings.fp32_weights:
        yield ["train.fp32_weights=false"]
    if value("train.optimizer._component_", "torch.optim.AdamW").startswith("torch.optim."):
        yield ["train.optimizer._component_=torchao.optim.AdamW8bit"]
    if settings.optimizer.get("foreach"):  # copies of all states, for a moment
        yield ["train.optimizer.fused=true"]
    if not settings.optimizer_in_backward:
        yield [
            "train.optimizer_in_backward=true",
            "train.gradient_accumulation_steps=1",
            "train.clip_grad_norm=null",
        ]
    if value("device", "cpu").startswith("cuda") and not settings.activation_offloading:
        yield ["activation_offloading=true"]
    if base.parameters.get("decoder", (0, 0))[1]:
        yield ["model.decoder_trainable=false", "lora.decoder.rank=16"]
    encoders = [trained for part, (_, trained) in base.parameters.items() if part.startswith("encoder")]
    if not settings.features_cached and not any(encoders):
        yield ["data.cache_features=features"]
