"""CLIP's vision tower as Hugging Face saves it, with torchtune's names for its parameters.

Keys are ``vision_model.embeddings...`` in older files and in whole CLIP models, which also hold the text
tower, and ``embeddings...`` in towers that newer versions save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, setting
from torchfuse.errors import CheckpointError

__all__ = ["ClipVision"]

_MAX_LAYERS: Final = 2**20


@register_format("encoder")
@dataclass(frozen=True)
class ClipVision(Spec):
    """CLIP's vision tower: torchfuse's ``ClipVisionEncoder``."""

    name = "clip"
    model_types = frozenset({"clip", "clip_vision_model"})

    image_size: int = setting("image_size", 224, shown_by_shapes=True)
    patch_size: int = setting("patch_size", 32, shown_by_shapes=True)
    embed_dim: int = setting("hidden_size", 768, shown_by_shapes=True)
    num_layers: int = setting("num_hidden_layers", 12, shown_by_shapes=True)
    hidden_dim: int = setting("intermediate_size", 3072, shown_by_shapes=True)
    num_heads: int = setting("num_attention_heads", 12)
    activation: str = setting("hidden_act", "quick_gelu", choices=("quick_gelu", "gelu"))
    norm_eps: float = setting("layer_norm_eps", 1e-5)
    # The fused model chooses which hidden state the features are.
    feature_layer: int = setting("feature_layer", -2, least=-_MAX_LAYERS, shown_by_shapes=True)
    keep_cls: bool = setting("keep_cls", False, shown_by_shapes=True)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipVision:
        given = Settings(config, cls.name)
        if config.get("model_type") == "clip":
            given = given.section("vision_config")
        given.allow_only("num_channels", 3)
        spec = cls(**cls.read_settings(given))
        if not -spec.num_layers - 1 <= spec.feature_layer <= spec.num_layers:
            given.problems.append(
                f"feature_layer={spec.feature_layer} must lie between {-spec.num_layers - 1} and "
                f"{spec.num_layers}"
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
            "num_channels": 3,
            **self.written_settings(),
        }

    def build(self) -> nn.Module:
        from torchfuse.encoders.clip import ClipVisionEncoder  # imports torchtune

        return ClipVisionEncoder(**dataclasses.asdict(self))

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
