r"""Llama as Hugging Face saves it, and torchtune's names for it.

The one thing that is more than a name: torchtune rotates neighbouring pairs of each head, as Meta's
code does, Hugging Face the two halves, so rows of the query and key projections are reordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from torchfuse.checkpoint.key_table import Format, Rule

__all__ = ["LLAMA"]


def _halves_to_pairs(weight: Tensor, module: nn.Module, name: str) -> Tensor:
    """Reorder rows ``[heads * head_dim, d]`` from (half, pair) to (pair, half)."""
    head_dim: Any = module.get_submodule(name.split(".attn.")[0] + ".attn").head_dim
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary embedding, from either spelling of the configuration."""
    new = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    scaling = {**old, **new}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    base = new.get("rope_theta", config.get("rope_theta", 10_000.0))
    rope = {"base": float(base), "kind": kind}
    if kind == "llama3":
        rope |= {
            "scale_factor": float(scaling["factor"]),
            "low_freq_factor": float(scaling["low_freq_factor"]),
            "high_freq_factor": float(scaling["high_freq_factor"]),
            "old_context_len": float(scaling["original_max_position_embeddings"]),
        }
    return rope


def _check_rope(config: Mapping[str, Any], rope: Any) -> list[str]:
    try:
        wanted = _rope_of(config)
    except (KeyError, TypeError, ValueError) as error:
        return [f"its rope parameters cannot be read ({error!r})"]
    faults = []
    if float(rope.base) != wanted["base"]:
        faults.append(f"rope base {wanted['base']:g}, the decoder has {rope.base:g}")
    scale = float(getattr(rope, "scale_factor", 1))
    if wanted["kind"] == "default":
        if scale != 1:
            faults.append(f"rope is not scaled, the decoder scales it by {scale:g}")
    elif wanted["kind"] == "llama3":
        for name in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len"):
            ours = float(getattr(rope, name, 1))
            if ours != wanted[name]:
                faults.append(f"rope {name} {wanted[name]:g}, the decoder has {ours:g}")
    else:
        faults.append(f"rope type {wanted['kind']!r}, which the decoder cannot express")
    return faults


def _check_config(config: Mapping[str, Any], decoder: nn.Module) -> list[str]:
    """What would give wrong numbers although every name and shape fits."""
    attn: Any = decoder.get_submodule("layers.0.attn")
    heads = config["num_attention_heads"]
    wanted = {
        "num_attention_heads": (heads, attn.num_heads),
        "num_key_value_heads": (config.get("num_key_value_heads") or heads, attn.num_kv_heads),
        "rms_norm_eps": (config.get("rms_norm_eps", 1e-6), getattr(decoder.norm, "eps", None)),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
    }
    faults = [
        f"{name} {theirs}, the decoder has {ours}"
        for name, (theirs, ours) in wanted.items()
        if ours is not None and theirs != ours
    ]
    return faults + (_check_rope(config, attn.pos_embeddings) if attn.pos_embeddings else [])


_LAYER: Final = r"(?:model\.)?layers\.(\d+)\."

LLAMA: Final = Format(
    name="Llama",
    rules=(
        Rule(r"(?:model\.)?embed_tokens\.weight", "tok_embeddings.weight"),
        Rule(_LAYER + r"input_layernorm\.weight", r"layers.\1.sa_norm.scale"),
        Rule(_LAYER + r"post_attention_layernorm\.weight", r"layers.\1.mlp_norm.scale"),
        Rule(
            _LAYER + r"self_attn\.([qk])_proj\.weight",
            r"layers.\1.attn.\2_proj.weight",
            _halves_to_pairs,
        ),
        Rule(_LAYER + r"self_attn\.v_proj\.weight", r"layers.\1.attn.v_proj.weight"),
        Rule(_LAYER + r"self_attn\.o_proj\.weight", r"layers.\1.attn.output_proj.weight"),
        Rule(_LAYER + r"mlp\.gate_proj\.weight", r"layers.\1.mlp.w1.weight"),
        Rule(_LAYER + r"mlp\.down_proj\.weight", r"layers.\1.mlp.w2.weight"),
        Rule(_LAYER + r"mlp\.up_proj\.weight", r"layers.\1.mlp.w3.weight"),
        Rule(r"(?:model\.)?norm\.weight", "norm.scale"),
        Rule(r"lm_head\.weight", "output.weight"),
        # Computed, not learned; files of early transformers hold them.
        Rule(_LAYER + r"self_attn\.rotary_emb\.inv_freq", None),
        Rule(r"(?:model\.)?rotary_emb\.inv_freq", None),
    ),
    tied={"output.weight": "tok_embeddings.weight"},
    check_config=_check_config,
)
