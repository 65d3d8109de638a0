"""CLIP's vision tower, out of torchtune's parts.

torchtune's ``VisionTransformer`` always runs to its end and normalises what comes out. A language
model wants something else of CLIP (LLaVA, https://arxiv.org/abs/2304.08485): the patch tokens of an
inner layer, as they stand in the residual stream. So this class keeps the parts and their names and
runs them up to the layer that is asked for.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torchtune.models.clip._component_builders import clip_mlp
from torchtune.models.clip._position_embeddings import TokenPositionalEmbedding
from torchtune.models.clip._text_encoder import QuickGELU
from torchtune.modules import (
    Fp32LayerNorm,
    MultiHeadAttention,
    TransformerSelfAttentionLayer,
    VisionTransformer,
)

from torchfuse.errors import ModelError

__all__ = ["ACTIVATIONS", "ClipVisionEncoder", "clip_vit_l_14_336"]

ACTIVATIONS: Final[dict[str, type[nn.Module]]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ClipVisionEncoder(VisionTransformer):
    """Features of images from a hidden layer of CLIP's vision transformer.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch, in pixels; divides ``image_size``.
        embed_dim: width of the transformer and of the features.
        num_layers: number of layers.
        num_heads: attention heads; divides ``embed_dim``.
        hidden_dim: width inside the feed-forwards; four times ``embed_dim`` unless given.
        activation: ``"quick_gelu"`` (OpenAI's weights) or ``"gelu"``.
        norm_eps: epsilon of the layer norms.
        feature_layer: which hidden state the features are, counted as transformers counts: 0 is the
            input of the first layer, ``num_layers`` or -1 the output of the last, -2 that of the
            last but one. Layers behind it keep their weights and do not run.
        keep_cls: whether the class token stays in front of the patch tokens.

    Raises:
        ModelError: if the numbers do not fit each other.

    Examples:
        >>> encoder = ClipVisionEncoder(
        ...     image_size=8, patch_size=4, embed_dim=6, num_layers=3, num_heads=2
        ... )
        >>> encoder(torch.randn(2, 3, 3, 8, 8)).shape  # two rows of three images, four patches each
        torch.Size([2, 12, 6])
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int | None = None,
        activation: str = "quick_gelu",
        norm_eps: float = 1e-5,
        feature_layer: int = -2,
        keep_cls: bool = False,
    ) -> None:
        sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "hidden_dim": hidden_dim or 1}
        problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
        if patch_size < 1 or image_size % max(patch_size, 1):
            problems.append(f"patch_size={patch_size} must divide image_size={image_size}")
        if num_heads < 1 or embed_dim % max(num_heads, 1):
            problems.append(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        if activation not in ACTIVATIONS:
            problems.append(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        if not -num_layers - 1 <= feature_layer <= num_layers:
            problems.append(
                f"feature_layer={feature_layer} must lie between {-num_layers - 1} and {num_layers}"
            )
        if problems:
            raise ModelError(f"CLIP vision tower: {'; '.join(problems)}.")
        layer = TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=embed_dim // num_heads,
                q_proj=nn.Linear(embed_dim, embed_dim),
                k_proj=nn.Linear(embed_dim, embed_dim),
                v_proj=nn.Linear(embed_dim, embed_dim),
                output_proj=nn.Linear(embed_dim, embed_dim),
                is_causal=False,
            ),
            mlp=clip_mlp(
                in_dim=embed_dim,
                out_dim=embed_dim,
                hidden_dim=hidden_dim or 4 * embed_dim,
                activation=ACTIVATIONS[activation](),
            ),
            sa_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
            mlp_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
        )
        super().__init__(
            patch_size=patch_size,
            tile_size=image_size,
            num_layers=num_layers,
            embed_dim=embed_dim,
            layer=layer,
            token_pos_embedding=TokenPositionalEmbedding(embed_dim, image_size, patch_size),
        )
        self.ln_pre.eps = self.ln_post.eps = norm_eps
        self.image_size = image_size
        self.feature_dim = embed_dim
        self.num_hidden = feature_layer % (num_layers + 1)
        self.keep_cls = keep_cls

    @property
    def num_tokens(self) -> int:
        """Features of one image."""
        return self.patches_per_tile + int(self.keep_cls)

    def example_input(self) -> dict[str, Tensor]:
        """One black image."""
        return {"images": torch.zeros(1, 3, self.image_size, self.image_size)}

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: normalised pixels, ``[b, 3, h, w]``, or ``[b, m, 3, h, w]`` for ``m`` images a
                row.

        Returns:
            Features ``[b, m * num_tokens, d_e]``, image by image, each in rows of its grid.

        Raises:
            ModelError: if the images are not of the size that the tower was trained with.
        """
        size = (3, self.image_size, self.image_size)
        if images.dim() not in (4, 5) or images.shape[-3:] != size:
            raise ModelError(
                f"CLIP takes images [b, 3, {self.image_size}, {self.image_size}] (or [b, m, 3, ..] "
                f"for m images a row), got {list(images.shape)}."
            )
        x = self.conv(images.flatten(0, -4)).flatten(2).transpose(1, 2)  # [b * m, patches, d_e]
        x = self.cls_token_embedding(x.unsqueeze(1)).squeeze(1)
        x = self.ln_pre(self.token_pos_embedding(x))
        for layer in self.layers[: self.num_hidden]:
            x = layer(x)
        if not self.keep_cls:
            x = x[:, 1:]
        return x.reshape(images.shape[0], -1, x.shape[-1])


def clip_vit_l_14_336(feature_layer: int = -2, keep_cls: bool = False) -> ClipVisionEncoder:
    """The vision tower of ``openai/clip-vit-large-patch14-336``, 304 M parameters, 576 patches.

    Args:
        feature_layer: which hidden state the features are, see ``ClipVisionEncoder``.
        keep_cls: whether the class token stays in front of the patch tokens.
    """
    return ClipVisionEncoder(
        image_size=336,
        patch_size=14,
        embed_dim=1024,
        num_layers=24,
        num_heads=16,
        feature_layer=feature_layer,
        keep_cls=keep_cls,
    )
