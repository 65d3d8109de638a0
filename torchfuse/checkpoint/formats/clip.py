"""CLIP's vision tower as Hugging Face saves it, with torchtune's names for its parameters.

Keys are ``vision_model.embeddings...`` in older files and in whole CLIP models, which also hold the text
tower, and ``embeddings...`` in towers that newer versions save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, setting, shown_by_shapes
from torchfuse.errors import CheckpointError

__all__ = ["ClipVision"]


@register_format("encoder")
@dataclass(frozen=True)
class ClipVision(Spec):
    """CLIP's vision tower: torchfuse's ``ClipVisionEncoder``."""

    name = "clip"
    model_types = frozenset({"clip", "clip_vision_model"})

    image_size: int = shown_by_shapes()
    patch_size: int = shown_by_shapes()
    embed_dim: int = shown_by_shapes()
    num_layers: int = shown_by_shapes()
    hidden_dim: int = shown_by_shapes()
    num_heads: int = setting("num_attention_heads")
    activation: str = setting("hidden_act")
    norm_eps: float = setting("layer_norm_eps")
    # The fused model chooses which hidden state the features are.
    feature_layer: int = shown_by_shapes(default=-2)
    keep_cls: bool = shown_by_shapes(default=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipVision:
        given = Settings(config, cls.name)
        if config.get("model_type") == "clip":
            given = given.section("vision_config")
        given.allow_only("num_channels", 3)
        num_layers = given.count("num_hidden_layers", 12)
        spec = cls(
            image_size=given.count("image_size", 224),
            patch_size=given.count("patch_size", 32),
            embed_dim=given.count("hidden_size", 768),
            num_layers=num_layers,
            hidden_dim=given.count("intermediate_size", 3072),
            num_heads=given.count("num_attention_heads", 12),
            activation=given.choice("hidden_act", {n: n for n in ("quick_gelu", "gelu")}, "quick_gelu"),
            norm_eps=given.number("layer_norm_eps", 1e-5),
            feature_layer=given.count("feature_layer", -2, least=-num_layers - 1),
            keep_cls=given.flag("keep_cls", False),
        )
        given.raise_problems()
        return spec

    @classmethod
    def matches_module(cls, module: nn.Module) -> bool:
        from torchtune.modules import VisionTransformer

        return isinstance(module, VisionTransformer)

    @classmethod
    def from_module(cls, module: nn.Module) -> ClipVision:
        tower: Any = module
        try:
            first = tower.layers[0]
            num_layers = len(tower.layers)
            return cls(
                image_size=tower.image_size,
                patch_size=tower.conv.kernel_size[0],
                embed_dim=tower.conv.out_channels,
                num_layers=num_layers,
                hidden_dim=first.mlp.w1.weight.shape[0],
                num_heads=first.attn.num_heads,
                activation={"QuickGELU": "quick_gelu", "GELU": "gelu"}[
                    type(first.mlp.activation).__name__
                ],
                norm_eps=tower.ln_pre.eps,
                feature_layer=tower.num_hidden - num_layers - 1,
                keep_cls=tower.keep_cls,
            )
        except (AttributeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"A {type(module).__name__} is no ClipVisionEncoder: it lacks {error}."
            ) from error

    def to_config(self) -> dict[str, Any]:
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.embed_dim,
            "num_hidden_layers": self.num_layers,
            "intermediate_size": self.hidden_dim,
            "num_attention_heads": self.num_heads,
            "num_channels": 3,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "feature_layer": self.feature_layer,
            "keep_cls": self.keep_cls,
        }

    def build(self) -> nn.Module:
        from torchfuse.encoders.clip import ClipVisionEncoder  # imports torchtune

        return ClipVisionEncoder(
            image_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_dim=self.hidden_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            feature_layer=self.feature_layer,
            keep_cls=self.keep_cls,
        )

    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + int(self.keep_cls)

    def key_table(self) -> KeyTable:
        modules = {
            "pre_layrnorm": "ln_pre",  # spelled like this in the files
            "post_layernorm": "ln_post",
            "encoder.layers.{}.layer_norm1": "layers.{}.sa_norm",
            "encoder.layers.{}.layer_norm2": "layers.{}.mlp_norm",
            "encoder.layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
            "encoder.layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
            "encoder.layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
            "encoder.layers.{}.self_attn.out_proj": "layers.{}.attn.output_proj",
            "encoder.layers.{}.mlp.fc1": "layers.{}.mlp.w1",
            "encoder.layers.{}.mlp.fc2": "layers.{}.mlp.w2",
        }
        return KeyTable(
            entries=(
                Entry("embeddings.class_embedding", "cls_token_embedding.weight"),
                Entry("embeddings.patch_embedding.weight", "conv.weight"),
                Entry(
                    "embeddings.position_embedding.weight", "token_pos_embedding.positional_embedding"
                ),
                *(
                    Entry(f"{source}.{kind}", f"{target}.{kind}")
                    for source, target in modules.items()
                    for kind in ("weight", "bias")
                ),
            ),
            aliases=(("vision_model.", ""),),
            # Computed buffers, and the other parts of a whole CLIP model.
            ignored=(
                r"embeddings\.position_ids",
                r"text_model\..+",
                r"(visual|text)_projection\.weight",
                r"logit_scale",
            ),
        )
