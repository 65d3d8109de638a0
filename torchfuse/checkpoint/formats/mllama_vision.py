"""The vision tower of Llama 3.2 Vision as Hugging Face saves it, and the projection after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable, Layout
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, parsed, setting

__all__ = ["TILE_EMBEDDINGS", "MllamaVision", "layer_entries"]

_RATIOS: Final = ([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1])

# Embeddings of tiles: target keys and source keys.
TILE_EMBEDDINGS: Final = {
    "clip.pre_tile_pos_embed.embedding": "pre_tile_positional_embedding.embedding.weight",
    "clip.post_tile_pos_embed.embedding": "post_tile_positional_embedding.embedding.weight",
    "clip.token_pos_embedding.global_token_positional_embedding": (
        "gated_positional_embedding.tile_embedding.weight"
    ),
}
_PLAIN: Final = {
    "class_embedding": "clip.cls_token_embedding.weight",
    "patch_embedding.weight": "clip.conv.weight",
    "gated_positional_embedding.embedding": "clip.token_pos_embedding.local_token_positional_embedding",
    "gated_positional_embedding.gate": "clip.token_pos_embedding.gate",
    "pre_tile_positional_embedding.gate": "clip.pre_tile_pos_embed.gate",
    "post_tile_positional_embedding.gate": "clip.post_tile_pos_embed.gate",
    "layernorm_pre.weight": "clip.ln_pre.weight",
    "layernorm_pre.bias": "clip.ln_pre.bias",
    "layernorm_post.weight": "clip.ln_post.weight",
    "layernorm_post.bias": "clip.ln_post.bias",
    "global_transformer.layers.{}.gate_attn": "projection.layers.{}.sa_scale.scale",
    "global_transformer.layers.{}.gate_ffn": "projection.layers.{}.mlp_scale.scale",
}
_LAYER: Final = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.fc1": "mlp.w1",
    "mlp.fc2": "mlp.w2",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}


@register_format("encoder")
@dataclass(frozen=True)
class MllamaVision(Spec):
    """Tower and projection: torchfuse's ``MllamaVisionEncoder``."""

    name = "mllama_vision"
    model_types = frozenset({"mllama_vision_model"})
    can_export = False  # transformers has no class for tower and projection without the decoder

    image_size: int = setting("image_size", 448, shown_by_shapes=True)
    patch_size: int = setting("patch_size", 14, shown_by_shapes=True)
    embed_dim: int = setting("hidden_size", 1280, shown_by_shapes=True)
    num_layers: int = setting("num_hidden_layers", 32, shown_by_shapes=True)
    num_global_layers: int = setting("num_global_layers", 8, least=0, shown_by_shapes=True)
    hidden_dim: int = setting("intermediate_size", 5120, shown_by_shapes=True)
    decoder_dim: int = setting("decoder_dim", shown_by_shapes=True)
    max_num_tiles: int = setting("max_num_tiles", 4, shown_by_shapes=True)
    num_heads: int = setting("attention_heads", 16)
    intermediate_layers: tuple[int, ...] = parsed("intermediate_layers_indices")
    supported_aspect_ratios: tuple[tuple[int, int], ...] = parsed("supported_aspect_ratios")
    norm_eps: float = setting("norm_eps", 1e-5)
    activation: str = setting("hidden_act", "gelu", choices=("gelu", "quick_gelu"))
    pad_tokens_to: int = setting("pad_tokens_to", 8)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MllamaVision:
        given = Settings(config, cls.name)
        given.allow_only("num_channels", 3)
        values = cls.read_settings(given)
        ratios = config.get("supported_aspect_ratios") or list(_RATIOS)
        if not isinstance(ratios, list) or not all(_is_ratio(ratio) for ratio in ratios):
            given.problems.append(
                f"supported_aspect_ratios must be pairs of counts above 0, got {ratios!r:.80}"
            )
            ratios = []
        num_layers = values["num_layers"]
        layers = given.counts("intermediate_layers_indices", [3, 7, 15, 23, 30], least=-num_layers)
        if layers and max(layers) >= num_layers:
            given.problems.append(f"intermediate_layers_indices {layers} must lie below {num_layers}")
        given.raise_problems()
        return cls(
            **values,
            intermediate_layers=tuple(layer % num_layers for layer in layers),
            supported_aspect_ratios=tuple((high, wide) for high, wide in ratios),
        )

    @classmethod
    def matches_module(cls, module: nn.Module) -> bool:
        from torchfuse.encoders.mllama import MllamaVisionEncoder  # imports torchtune

        return isinstance(module, MllamaVisionEncoder)

    @classmethod
    def from_module(cls, module: nn.Module) -> MllamaVision:
        tower: Any = module
        first = tower.clip.layers[0]
        return cls(
            image_size=tower.image_size,
            patch_size=tower.clip.conv.kernel_size[0],
            embed_dim=tower.clip.conv.out_channels,
            num_layers=len(tower.clip.layers),
            num_global_layers=len(tower.projection.layers),
            hidden_dim=first.mlp.w1.weight.shape[0],
            decoder_dim=tower.feature_dim,
            max_num_tiles=tower.max_num_tiles,
            num_heads=first.attn.num_heads,
            intermediate_layers=tuple(tower.clip.hidden_layers),
            supported_aspect_ratios=tuple(tower.aspect_ratios),
            norm_eps=first.sa_norm.eps,
            activation={"QuickGELU": "quick_gelu", "GELU": "gelu"}[type(first.mlp.activation).__name__],
            pad_tokens_to=tower.pad_tokens_to,
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "architectures": ["MllamaVisionModel"],
            "model_type": "mllama_vision_model",
            "num_channels": 3,
            "intermediate_layers_indices": list(self.intermediate_layers),
            "supported_aspect_ratios": [list(ratio) for ratio in self.supported_aspect_ratios],
            "vision_output_dim": self.embed_dim * (1 + len(self.intermediate_layers)),
            **self.written_settings(),
        }

    def build(self) -> nn.Module:
        from torchfuse.encoders.mllama import MllamaVisionEncoder  # imports torchtune

        return MllamaVisionEncoder(**dataclasses.asdict(self))

    def total_layers(self) -> int:
        return super().total_layers() + self.num_global_layers

    def tokens_per_tile(self) -> int:
        """Return the number of features of one tile: its patches and a class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def num_tokens(self) -> int:
        return self.max_num_tiles * self.tokens_per_tile()

    def key_table(self) -> KeyTable:
        entries = [Entry("vision_model." + source, target) for source, target in _PLAIN.items()]
        for target, source in TILE_EMBEDDINGS.items():
            tokens = self.tokens_per_tile() if "token" in target else 1
            entries.append(Entry("vision_model." + source, target, self._rows_layout(tokens)))
        for source, target in {"transformer": "clip", "global_transformer": "projection"}.items():
            entries += layer_entries(
                f"vision_model.{source}.layers.{{}}.", f"{target}.layers.{{}}.", _LAYER
            )
        for kind in ("weight", "bias"):
            entries.append(Entry(f"multi_modal_projector.{kind}", f"projection.output.{kind}"))
        return KeyTable(tuple(entries))

    def _rows_layout(self, tokens: int) -> Layout:
        """Return the layout of a table that has one flat row per aspect ratio in the checkpoint."""
        tiles = (self.max_num_tiles, tokens, self.embed_dim)
        return Layout(lambda flat: flat.unflatten(1, tiles), lambda table: table.flatten(1))


def layer_entries(source: str, target: str, modules: Mapping[str, str]) -> list[Entry]:
    """Return the entries of a tower's layers, in which only the attention's projections lack a bias."""
    return [
        Entry(f"{source}{s}.{kind}", f"{target}{t}.{kind}")
        for s, t in modules.items()
        for kind in (("weight",) if "attn" in t else ("weight", "bias"))
    ]


def _is_ratio(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
