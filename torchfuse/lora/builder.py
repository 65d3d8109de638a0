"""A builder of models with LoRA, for ``_component_:`` in the YAML of torchtune's LoRA recipes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchfuse.components import build
from torchfuse.lora.add import add_lora

__all__ = ["lora_model"]


def lora_model(
    *,
    model: Mapping[str, Any],
    lora_attn_modules: Sequence[str],
    lora_rank: int,
    lora_alpha: float,
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> nn.Module:
    """Build a fused model with LoRA in its decoder, by the keywords of torchtune's LoRA builders.

    Args:
        model: a section ``_component_`` with keywords, that returns a fused model.
        lora_attn_modules: which of ``q_proj``, ``k_proj``, ``v_proj`` and ``output_proj`` have LoRA.
        lora_rank: see ``add_lora``.
        lora_alpha: see ``add_lora``.
        apply_lora_to_mlp: whether ``w1``, ``w2`` and ``w3`` have LoRA.
        apply_lora_to_output: whether the output head has LoRA.
        lora_dropout: see ``add_lora``.
        use_dora: see ``add_lora``.
        quantize_base: see ``add_lora``.

    Raises:
        ConfigError: if the section is wrong; as ``add_lora``.
        ModelError: as ``add_lora``.
    """
    from torchtune.modules.common_utils import reparametrize_as_dtype_state_dict_post_hook

    built: nn.Module = build(model, what="model.model", kind=nn.Module)
    targets = [f"attn.{name}" for name in lora_attn_modules]
    targets += ["mlp.w1", "mlp.w2", "mlp.w3"] if apply_lora_to_mlp else []
    targets += ["output"] if apply_lora_to_output else []
    add_lora(
        built,
        rank=lora_rank,
        alpha=lora_alpha,
        targets=targets,
        dropout=lora_dropout,
        dora=use_dora,
        quantize_base=quantize_base,
    )
    if quantize_base:  # the recipes merge in the state dict
        dtype = next(built.parameters()).dtype
        built._register_state_dict_hook(
            functools.partial(reparametrize_as_dtype_state_dict_post_hook, dtype=dtype)
        )
    return built
