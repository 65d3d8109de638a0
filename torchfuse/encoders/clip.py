"""CLIP's vision tower, built from torchtune's parts.

torchtune's ``VisionTransformer`` runs all of its layers and normalises the output. Language models take
the patch tokens of an inner layer before any final norm (LLaVA, https://arxiv.org/abs/2304.08485). This
class keeps the parts and their names, and runs them up to a chosen layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchtune.models.clip._position_embeddings import TokenPositionalEmbedding
from torchtune.modules import VisionTransformer

from torchfuse.encoders.vit import vit_layer, vit_problems
from torchfuse.errors import ConfigError, ModelError

__all__ = ["ClipVisionEncoder", "clip_vit_l_14_336"]


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
            last but one. Later layers keep their weights and do not run.
        keep_cls: whether the class token stays in front of the patch tokens.

    Raises:
        ConfigError: naming every number that is out of range or does not fit the others.

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
        problems = vit_problems(
            image_size=image_size,
            patch_size=patch_size,
            num_heads=num_heads,
            activation=activation,
            embed_dim=embed_dim,
            num_layers=num_layers,
            hidden_dim=1 if hidden_dim is None else hidden_dim,
        )
        if not -num_layers - 1 <= feature_layer <= num_layers:
            problems.append(
                f"feature_layer={feature_layer} must lie between {-num_layers - 1} and {num_layers}"
            )
        if problems:
            raise ConfigError(f"CLIP vision tower: {'; '.join(problems)}.")
        super().__init__(
            patch_size=patch_size,
            tile_size=image_size,
            num_layers=num_layers,
            embed_dim=embed_dim,
            layer=vit_layer(
                embed_dim,
                num_heads,
                hidden_dim or 4 * embed_dim,
                activation=activation,
                norm_eps=norm_eps,
                bias=True,
            ),
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
        """Return one black image."""
        return {"images": torch.zeros(1, 3, self.image_size, self.image_size)}

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: normalised pixels, ``[b, 3, h, w]``, or ``[b, m, 3, h, w]`` for ``m`` images a
                row.

        Returns:
            Features ``[b, m * num_tokens, d_e]``, image by image, each in rows of its grid.

        Raises:
            ModelError: if the images have another size than ``image_size``.
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
    """Build the vision tower of ``openai/clip-vit-large-patch14-336``: 304 M parameters, 576 patches.

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
