"""The vision tower of Llama 3.2 Vision (Mllama), built from torchtune's parts.

torchtune's ``Llama3VisionEncoder`` leaves out two things that the weights were trained with. Tokens of
a tile are padded with zeros to a multiple of eight, and these padding tokens are keys for all valid
tokens; invalid tokens (padding tokens, and all tokens of padding tiles) attend to valid ones only. And
transformers holds the embeddings of tiles as one row for each aspect ratio, where Meta and torchtune
hold one grid of which every aspect ratio takes a corner. Rows can hold all that a grid can, and more, so
this tower has rows; ``mllama_tiles`` converts between the two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.encoders.mllama_tiles import AspectRatios, ratio_problems
from torchfuse.encoders.mllama_transformer import (
    MaskedProjectionHead,
    TiledTokenEmbedding,
    TiledVisionTransformer,
    TileEmbedding,
)
from torchfuse.encoders.vit import vit_layer, vit_problems
from torchfuse.errors import ConfigError, ModelError
from torchfuse.params import register_fusion_module

__all__ = ["MllamaVisionEncoder"]


class MllamaVisionEncoder(nn.Module):
    """Features of images that are cut into tiles, for the decoder of Llama 3.2 Vision.

    Its children are ``clip`` and ``projection``, as in torchtune; the projection's parameters are fusion
    parameters.

    Args:
        image_size: side of a tile, in pixels.
        patch_size: side of a patch, in pixels; divides ``image_size``.
        embed_dim: width of both transformers.
        num_layers: layers of the first transformer, ``clip``.
        num_global_layers: gated layers of the second, ``projection``.
        num_heads: attention heads; divides ``embed_dim``.
        hidden_dim: width inside the feed-forwards.
        decoder_dim: width of the features.
        intermediate_layers: hidden states of ``clip`` that are projected beside the last, counted as
            transformers 5.23 counts ``intermediate_layers_indices``: ``i`` is the output of layer
            ``i``, and a negative one counts from the end. In Meta's code, torchtune (``out_indices``)
            and early versions of transformers ``i`` is the *input* of layer ``i``: pass ``i - 1``.
        max_num_tiles: tiles that every image is padded to.
        supported_aspect_ratios: (tiles high, tiles wide) of the ids 1, 2, ...; id 0 is an image that
            pads a row.
        norm_eps: epsilon of the norms in the layers; the two other norms have 1e-5.
        activation: ``"gelu"`` or ``"quick_gelu"``.
        in_channels: channels of the images.
        pad_tokens_to: tokens of a tile are padded to a multiple of this; the weights were trained
            with 8, and torchtune's tower has 1.

    Raises:
        ConfigError: naming every number that is out of range or does not fit the others.

    Examples:
        >>> encoder = MllamaVisionEncoder(
        ...     image_size=8, patch_size=4, embed_dim=6, num_layers=3, num_global_layers=2, num_heads=2,
        ...     hidden_dim=11, decoder_dim=7, intermediate_layers=[0, 1], max_num_tiles=2,
        ...     supported_aspect_ratios=[(1, 1), (1, 2), (2, 1)],
        ... )
        >>> images = torch.randn(1, 3, 2, 3, 8, 8)  # one row of three images, the last is padding
        >>> encoder(images, torch.tensor([[[2, 1], [1, 1], [0, 0]]])).shape  # five tokens a tile
        torch.Size([1, 30, 7])
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        num_layers: int,
        num_global_layers: int,
        num_heads: int,
        hidden_dim: int,
        decoder_dim: int,
        intermediate_layers: Sequence[int],
        max_num_tiles: int,
        supported_aspect_ratios: AspectRatios,
        norm_eps: float = 1e-5,
        activation: str = "gelu",
        in_channels: int = 3,
        pad_tokens_to: int = 8,
    ) -> None:
        super().__init__()
        problems = vit_problems(
            image_size=image_size,
            patch_size=patch_size,
            num_heads=num_heads,
            activation=activation,
            embed_dim=embed_dim,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            decoder_dim=decoder_dim,
            max_num_tiles=max_num_tiles,
            in_channels=in_channels,
            pad_tokens_to=pad_tokens_to,
        )
        if num_global_layers < 0:
            problems.append(f"num_global_layers={num_global_layers} must be at least 0")
        outside = [i for i in intermediate_layers if not -num_layers <= i < num_layers]
        if outside:
            problems.append(f"intermediate_layers {outside} must lie in [{-num_layers}, {num_layers})")
        problems += ratio_problems(supported_aspect_ratios, max_num_tiles)
        if problems:
            raise ConfigError(f"Mllama vision tower: {'; '.join(problems)}.")
        self.image_size, self.in_channels = image_size, in_channels
        self.feature_dim = decoder_dim
        self.max_num_tiles = max_num_tiles
        self.pad_tokens_to = pad_tokens_to
        self.aspect_ratios = [(int(h), int(w)) for h, w in supported_aspect_ratios]
        layers = [
            vit_layer(
                embed_dim,
                num_heads,
                hidden_dim,
                activation=activation,
                norm_eps=norm_eps,
                bias=False,
                gated=index > 0,
            )
            for index in range(1 + num_global_layers)
        ]
        tables = [
            (len(self.aspect_ratios) + 1, max_num_tiles, n, embed_dim)
            for n in (1, (image_size // patch_size) ** 2 + 1)
        ]
        self.clip = TiledVisionTransformer(
            patch_size=patch_size,
            tile_size=image_size,
            num_layers=num_layers,
            embed_dim=embed_dim,
            layer=layers[0],
            token_pos_embedding=TiledTokenEmbedding(tables[1]),
            pre_tile_pos_embed=TileEmbedding(tables[0]),
            post_tile_pos_embed=TileEmbedding(tables[0]),
            in_channels=in_channels,
        )
        self.clip.hidden_layers = [i % num_layers for i in intermediate_layers]
        self.clip.num_padding = -self.tokens_per_tile % pad_tokens_to
        self.projection = MaskedProjectionHead(
            layers=layers[1:],
            output=nn.Linear(embed_dim * (1 + len(intermediate_layers)), decoder_dim),
            num_hidden_inputs=len(intermediate_layers),
        )
        register_fusion_module(self.projection)

    @property
    def tokens_per_tile(self) -> int:
        """Features of one tile: a class token and its patches."""
        return int(self.clip.get_image_tokens_per_tile())

    @property
    def num_tokens(self) -> int:
        """Features of one image, those of padding tiles included."""
        return self.max_num_tiles * self.tokens_per_tile

    def example_input(self) -> dict[str, Tensor]:
        """Return one black image of the smallest aspect ratio."""
        h, w = min(self.aspect_ratios, key=lambda ratio: ratio[0] * ratio[1])
        shape = (1, 1, h * w, self.in_channels, self.image_size, self.image_size)
        return {"images": torch.zeros(shape), "aspect_ratio": torch.tensor([[[h, w]]])}

    def forward(
        self,
        images: Tensor,
        aspect_ratio: Tensor | None = None,
        *,
        aspect_ratio_ids: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode images.

        Args:
            images: normalised pixels of tiles, ``[b, m, t, c, s, s]`` for ``m`` images a row: tiles in
                rows of their image, then padding tiles. With ``t`` below ``max_num_tiles``, black
                tiles are appended, as the weights were trained with that many.
            aspect_ratio: (tiles high, tiles wide) of each image, ``[b, m, 2]``; (0, 0) for an image
                that pads a row. Optional if ``t`` is 1.
            aspect_ratio_ids: instead of it transformers' ids, ``[b, m]``.
            aspect_ratio_mask: which tiles are valid, ``[b, m, t]``, True (or 1): all tokens may attend
                to it. None: as many as the aspect ratio has, and the first tile of an image that pads
                a row. In an image without a valid tile everything attends to everything.

        Returns:
            Features ``[b, m * num_tokens, decoder_dim]``, image by image, tile by tile, those of
            padding tiles included: mask them out by ``encoder_mask_of_tiles``.

        Raises:
            ModelError: for shapes that do not fit, and, on the CPU, for an aspect ratio that is not
                supported or has more tiles than ``images``. On other devices that would synchronise,
                so there it is a device-side assertion.
        """
        self._check_shapes(images, aspect_ratio, aspect_ratio_ids, aspect_ratio_mask)
        b, m, t = images.shape[:3]
        ids, num_tiles = self._ids(images, aspect_ratio, aspect_ratio_ids)  # [b, m] both
        if aspect_ratio_mask is None:
            self._check(num_tiles <= t, num_tiles, f"tiles an image, but images has {t}")
            tiles = torch.arange(self.max_num_tiles, device=images.device) < num_tiles.unsqueeze(-1)
        else:
            tiles = F.pad(aspect_ratio_mask != 0, (0, self.max_num_tiles - t))  # [b, m, max_num_tiles]
        images = F.pad(images, (0, 0) * 3 + (0, self.max_num_tiles - t))
        mask = self.clip.attention_mask(tiles.flatten(0, 1))
        x, hidden_states = self.clip(images, ids, mask)
        features = self.projection(x, hidden_states, mask=mask)
        features = features.reshape(b, m * self.max_num_tiles, -1, self.feature_dim)
        return features[:, :, : self.tokens_per_tile].flatten(1, 2)

    def _ids(self, images: Tensor, ratio: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the aspect ratio's id and the number of tiles of every image, ``[b, m]`` both."""
        if ratio is None and ids is None:
            ratio = torch.ones(*images.shape[:2], 2, dtype=torch.long, device=images.device)
        if ratio is not None:
            ids = torch.zeros(ratio.shape[:2], dtype=torch.long, device=ratio.device)
            for index, (h, w) in enumerate(self.aspect_ratios, start=1):
                ids = ids + index * ((ratio[..., 0] == h) & (ratio[..., 1] == w))
            known, given = (ids > 0) | (ratio == 0).all(dim=-1), ratio
            supported = f"the aspect ratios {self.aspect_ratios}, and (0, 0) for padding"
        else:
            assert ids is not None
            ids = ids.long()
            known, given = (ids >= 0) & (ids <= len(self.aspect_ratios)), ids
            supported = f"the ids 0 to {len(self.aspect_ratios)} of {self.aspect_ratios}"
        self._check(known, given, f"among the given, but supported are {supported}")
        num_tiles = torch.ones_like(ids)
        for index, (h, w) in enumerate(self.aspect_ratios, start=1):
            num_tiles = num_tiles.masked_fill(ids == index, h * w)
        return ids, num_tiles

    def _check(self, fits: Tensor, given: Tensor, problem: str) -> None:
        if given.device.type == "meta":
            return
        if given.device.type != "cpu" or torch.compiler.is_compiling() or type(given) is not Tensor:
            torch._assert_async(fits.all(), f"Mllama vision tower: {problem}")
            return
        wrong = given[~fits].tolist()
        if wrong:
            raise ModelError(f"Mllama vision tower: {wrong} {problem}.")

    def _check_shapes(
        self, images: Tensor, ratio: Tensor | None, ids: Tensor | None, mask: Tensor | None
    ) -> None:
        shape, tile = list(images.shape), [self.in_channels, self.image_size, self.image_size]
        if images.dim() != 6 or shape[3:] != tile or not 1 <= shape[2] <= self.max_num_tiles:
            raise ModelError(
                f"The Mllama vision tower takes images [b, m, t, {', '.join(map(str, tile))}] with t "
                f"from 1 to {self.max_num_tiles} tiles an image, got {shape}."
            )
        problems = []
        if ratio is not None and ids is not None:
            problems.append("aspect_ratio and aspect_ratio_ids mean the same; give one of them")
        if ratio is None and ids is None and (shape[2] > 1 or (1, 1) not in self.aspect_ratios):
            problems.append(f"give aspect_ratio [b, m, 2], without which {shape[2]} tiles are ambiguous")
        for name, given, expected in (
            ("aspect_ratio", ratio, [*shape[:2], 2]),
            ("aspect_ratio_ids", ids, shape[:2]),
            ("aspect_ratio_mask", mask, shape[:3]),
        ):
            if given is not None and list(given.shape) != expected:
                problems.append(f"{name} must have shape {expected}, got {list(given.shape)}")
        if problems:
            raise ModelError(f"Mllama vision tower, images {shape}: {'; '.join(problems)}.")
