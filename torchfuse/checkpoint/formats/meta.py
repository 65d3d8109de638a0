"""Llama 3.2 Vision as Meta published it: ``consolidated.00.pth`` and ``params.json``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, IndexMap, KeyTable, Layout
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.mllama import Mllama
from torchfuse.checkpoint.formats.mllama_vision import MllamaVision, layer_entries
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec
from torchfuse.checkpoint.formats.torchtune import grid_layout
from torchfuse.io.directory import Checkpoint
from torchfuse.models.base import FusedModel

__all__ = ["Meta"]

_TOWER: Final = "vision_model.vision_encoder."
# Settings that params.json lacks; they are the same in all published checkpoints.
_VISION: Final[dict[str, Any]] = {
    "patch_size": 14,
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "intermediate_size": 5120,
    "attention_heads": 16,
    # The states after these layers; Meta's code counts states before layers: [3, 7, 15, 23, 30].
    "intermediate_layers_indices": [2, 6, 14, 22, 29],
}
_TEXT: Final = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "learnable_embedding.weight": "tok_embeddings.fusion_embedding.weight",
    "norm.weight": "norm.scale",
    "output.weight": "output.weight",
}
_LAYER: Final = {
    "attention_norm.weight": "sa_norm.scale",
    "ffn_norm.weight": "mlp_norm.scale",
    "attention.wq.weight": "attn.q_proj.weight",
    "attention.wk.weight": "attn.k_proj.weight",
    "attention.wv.weight": "attn.v_proj.weight",
    "attention.wo.weight": "attn.output_proj.weight",
    "feed_forward.w1.weight": "mlp.w1.weight",
    "feed_forward.w2.weight": "mlp.w2.weight",
    "feed_forward.w3.weight": "mlp.w3.weight",
}
_CROSSING: Final = _LAYER | {
    "attention_norm.weight": "ca_norm.scale",
    "attention.q_norm.weight": "attn.q_norm.scale",
    "attention.k_norm.weight": "attn.k_norm.scale",
    "gate_attn": "ca_scale.scale",
    "gate_ffwd": "mlp_scale.scale",
}
_PLAIN: Final = {
    _TOWER + "class_embedding": "clip.cls_token_embedding.weight",
    _TOWER + "positional_embedding": "clip.token_pos_embedding.local_token_positional_embedding",
    _TOWER + "gated_positional_embedding_gate": "clip.token_pos_embedding.gate",
    _TOWER + "pre_tile_pos_embed.gate": "clip.pre_tile_pos_embed.gate",
    _TOWER + "post_tile_pos_embed.gate": "clip.post_tile_pos_embed.gate",
    _TOWER + "ln_pre.weight": "clip.ln_pre.weight",
    _TOWER + "ln_pre.bias": "clip.ln_pre.bias",
    _TOWER + "ln_post.weight": "clip.ln_post.weight",
    _TOWER + "ln_post.bias": "clip.ln_post.bias",
    _TOWER + "global_transformer.resblocks.{}.gate_attn": "projection.layers.{}.sa_scale.scale",
    _TOWER + "global_transformer.resblocks.{}.gate_ffn": "projection.layers.{}.mlp_scale.scale",
    "vision_model.vision_projection.weight": "projection.output.weight",
    "vision_model.vision_projection.bias": "projection.output.bias",
}
_GRIDS: Final = {
    "gated_positional_embedding": "clip.token_pos_embedding.global_token_positional_embedding",
    "pre_tile_pos_embed.embedding": "clip.pre_tile_pos_embed.embedding",
    "post_tile_pos_embed.embedding": "clip.post_tile_pos_embed.embedding",
}
_TOWER_LAYER: Final = {
    "attn.wq": "attn.q_proj",
    "attn.wk": "attn.k_proj",
    "attn.wv": "attn.v_proj",
    "attn.wo": "attn.output_proj",
    "mlp.c_fc": "mlp.w1",
    "mlp.c_proj": "mlp.w2",
    "ln_1": "sa_norm",
    "ln_2": "mlp_norm",
}


@register_format("model")
@dataclass(frozen=True)
class Meta(ModelSpec):
    """A whole Llama 3.2 Vision under Meta's keys."""

    name = "meta"
    model_types = frozenset({"meta"})
    can_export = False

    model: Mllama

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Meta:
        given = Settings(config, "Meta", "params.json")
        num_layers, width = given.count("n_layers"), given.count("dim")
        crossing = given.count("vision_num_cross_attention_layers")
        multiple, factor = given.count("multiple_of", 256), given.number("ffn_dim_multiplier", 1.0)
        hidden = multiple * math.ceil(int(factor * int(8 * width / 3)) / multiple)
        scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        text: dict[str, Any] = {
            "vocab_size": given.count("vocab_size"),
            "num_hidden_layers": num_layers,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_attention_heads": given.count("n_heads"),
            "num_key_value_heads": given.count("n_kv_heads", given.count("n_heads")),
            "max_position_embeddings": 131_072,
            "rms_norm_eps": given.number("norm_eps", 1e-5),
            "rope_theta": given.number("rope_theta", 500_000.0),
        }
        if given.flag("use_scaled_rope", False):
            text["rope_scaling"] = {**scaled, "original_max_position_embeddings": 8192}
        vision = {
            "image_size": given.count("vision_chunk_size"),
            "max_num_tiles": given.count("vision_max_num_chunks", 4),
            "decoder_dim": width,
            **_VISION,
        }
        if crossing > num_layers:
            given.problems.append(f"{crossing} cross-attention layers are more than {num_layers} layers")
        given.raise_problems()
        step = math.ceil(num_layers / crossing)
        fused = sorted(range(num_layers - 1, -1, -step)[:crossing])
        return cls(Mllama(Llama.from_config(text), MllamaVision.from_config(vision), tuple(fused)))

    @classmethod
    def from_module(cls, module: nn.Module) -> Meta:
        return cls(Mllama.from_module(module))

    @classmethod
    def from_keys(cls, checkpoint: Checkpoint, model: nn.Module | None) -> Meta | None:
        if "model_type" in checkpoint.config or not _has_meta_keys(checkpoint):
            return None
        if "n_layers" not in checkpoint.config and model is not None:
            return cls.from_module(model)
        return cls.from_config(checkpoint.config)

    def to_config(self) -> dict[str, Any]:
        raise NotImplementedError("Meta's format is read only.")

    def build(self) -> FusedModel:
        return self.model.build()

    def key_table(self) -> KeyTable:
        crossing = IndexMap.from_pairs(dict(enumerate(self.model.fused)))
        source, target = "text_model.", "decoder."
        entries = [Entry(source + s, target + t) for s, t in _TEXT.items()]
        entries += [
            Entry(f"{source}layers.{{}}.{s}", f"{target}layers.{{}}.{t}") for s, t in _LAYER.items()
        ]
        entries += [
            Entry(
                f"{source}cross_attention_layers.{{}}.{s}",
                f"{target}layers.{{}}.fusion_layer.{t}",
                index_map=crossing,
            )
            for s, t in _CROSSING.items()
        ]
        vision = [Entry(s, t) for s, t in _PLAIN.items()]
        grid = grid_layout(self.model.vision)
        vision += [Entry(_TOWER + s, t, grid) for s, t in _GRIDS.items()]
        vision.append(Entry(_TOWER + "conv1._linear.weight", "clip.conv.weight", self._patches()))
        for s, t in {"transformer": "clip", "global_transformer": "projection"}.items():
            vision += layer_entries(f"{_TOWER}{s}.resblocks.{{}}.", f"{t}.layers.{{}}.", _TOWER_LAYER)
        entries += [entry.with_prefix("", "encoder.") for entry in vision]
        return KeyTable(tuple(entries), ignored=(r"text_model\.rope\.freqs",))

    def _patches(self) -> Layout:
        """Return the layout of the first convolution, which Meta has as a linear layer over patches."""
        side = self.model.vision.patch_size
        return Layout(lambda flat: flat.unflatten(1, (3, side, side)), lambda kernel: kernel.flatten(1))


def _has_meta_keys(keys: Collection[str]) -> bool:
    starts = ("text_model.", "vision_model.")
    return all(key.startswith(starts) for key in keys) and "text_model.tok_embeddings.weight" in keys
