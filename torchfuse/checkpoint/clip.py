r"""CLIP's vision tower as Hugging Face saves it, and torchtune's names for it.

Two spellings are about: ``vision_model.embeddings...`` in older files and in whole CLIP models, which
also hold the text tower, and ``embeddings...`` in towers that newer versions save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.key_table import Format, Rule

__all__ = ["CLIP"]


def _check_config(config: Mapping[str, Any], encoder: nn.Module) -> list[str]:
    norm: Any = encoder.ln_pre
    vision = config.get("vision_config", config)
    attn: Any = encoder.get_submodule("layers.0.attn")
    mlp: Any = encoder.get_submodule("layers.0.mlp")
    quick = type(mlp.activation).__name__ == "QuickGELU"
    wanted = {
        "num_attention_heads": (vision["num_attention_heads"], attn.num_heads),
        "hidden_act": (vision.get("hidden_act", "quick_gelu"), "quick_gelu" if quick else "gelu"),
        "layer_norm_eps": (vision.get("layer_norm_eps", 1e-5), norm.eps),
    }
    return [
        f"{name} {theirs}, the tower has {ours}"
        for name, (theirs, ours) in wanted.items()
        if theirs != ours
    ]


_VISION: Final = r"(?:vision_model\.)?"
_LAYER: Final = _VISION + r"encoder\.layers\.(\d+)\."

CLIP: Final = Format(
    name="CLIP vision tower",
    rules=(
        Rule(_VISION + r"embeddings\.class_embedding", "cls_token_embedding.weight"),
        Rule(_VISION + r"embeddings\.patch_embedding\.weight", "conv.weight"),
        Rule(
            _VISION + r"embeddings\.position_embedding\.weight",
            "token_pos_embedding.positional_embedding",
        ),
        Rule(_VISION + r"pre_layrnorm\.(weight|bias)", r"ln_pre.\1"),  # their spelling
        Rule(_VISION + r"post_layernorm\.(weight|bias)", r"ln_post.\1"),
        Rule(_LAYER + r"layer_norm1\.(weight|bias)", r"layers.\1.sa_norm.\2"),
        Rule(_LAYER + r"layer_norm2\.(weight|bias)", r"layers.\1.mlp_norm.\2"),
        Rule(_LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"layers.\1.attn.\2_proj.\3"),
        Rule(_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"layers.\1.attn.output_proj.\2"),
        Rule(_LAYER + r"mlp\.fc1\.(weight|bias)", r"layers.\1.mlp.w1.\2"),
        Rule(_LAYER + r"mlp\.fc2\.(weight|bias)", r"layers.\1.mlp.w2.\2"),
        # Computed, not learned; and what else a whole CLIP model holds.
        Rule(_VISION + r"embeddings\.position_ids", None),
        Rule(r"text_model\..+", None),
        Rule(r"(?:visual|text)_projection\.weight", None),
        Rule(r"logit_scale", None),
    ),
    check_config=_check_config,
)
