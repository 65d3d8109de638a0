"""The vision tower of Llama 3.2 Vision (Mllama), out of torchtune's parts.

torchtune's ``Llama3VisionEncoder`` leaves out two things that the weights were trained with. Tokens of
a tile are padded with zeros to a multiple of eight, and these padding tokens are keys for everything
that is valid; what is invalid (padding tokens, and all tokens of padding tiles) attends to what is
valid only. And transformers holds the embeddings of tiles as one row an aspect ratio where Meta and
torchtune hold one grid that every aspect ratio cuts its corner from. Rows can say all that a grid
can, and more, so rows are the form here; ``mllama_tiles`` changes one into the
other. Layers, gates, norms and names are torchtune's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.clip._component_builders import clip_mlp
from torchtune.models.llama3_2_vision._encoder import Llama3VisionProjectionHead
from torchtune.modules import (
    Fp32LayerNorm,
    MultiHeadAttention,
    TanhGate,
    TransformerSelfAttentionLayer,
    VisionTransformer,
)

from torchfuse.encoders.clip import ACTIVATIONS
from torchfuse.encoders.mllama_tiles import AspectRatios, ratio_problems
from torchfuse.errors import ModelError
from torchfuse.params import register_fusion_module

__all__ = ["MllamaVisionEncoder"]


class MllamaVisionEncoder(nn.Module):
    """Features of images that are cut into tiles, as Llama 3.2 Vision's decoder attends to them.

    Its children are ``clip`` and ``projection``, as in torchtune; fusion learns the projection.

    Args:
        image_size: side of a tile, in pixels.
        patch_size: side of a patch, in pixels; divides ``image_size``.
        embed_dim: width of both transformers.
        num_layers: layers of the first transformer, ``clip``.
        num_global_layers: gated layers of the second, ``projection``.
        num_heads: attention heads; divides ``embed_dim``.
        hidden_dim: width inside the feed-forwards.
        decoder_dim: width of the features.
        intermediate_layers: which hidden states of ``clip`` the features are projected from beside
            the last, counted as transformers 5.23 counts ``intermediate_layers_indices``: ``i`` is
            the state *behind* layer ``i``, a negative one counts from the end. Meta, torchtune
            (``out_indices``) and transformers as it first had the model mean the state *before* layer
            ``i``; for their ``i`` give ``i - 1``.
        max_num_tiles: tiles that every image is padded to.
        supported_aspect_ratios: (tiles high, tiles wide) of the ids 1, 2, ...; id 0 is an image that
            pads a row.
        norm_eps: epsilon of the norms in the layers; that of the two others is 1e-5.
        activation: ``"gelu"`` or ``"quick_gelu"``.
        in_channels: channels of the images.
        pad_tokens_to: tokens of a tile are padded to a multiple of this; the weights were trained
            with 8, and torchtune's tower has 1.

    Raises:
        ModelError: if the numbers do not fit each other.

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
        sizes = {
            "embed_dim": embed_dim,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "decoder_dim": decoder_dim,
            "max_num_tiles": max_num_tiles,
            "in_channels": in_channels,
            "pad_tokens_to": pad_tokens_to,
        }
        problems = [f"{name}={size} must be at least 1" for name, size in sizes.items() if size < 1]
        if num_global_layers < 0:
            problems.append(f"num_global_layers={num_global_layers} must be at least 0")
        if patch_size < 1 or image_size < 1 or image_size % max(patch_size, 1):
            problems.append(f"patch_size={patch_size} must divide image_size={image_size}")
        if num_heads < 1 or embed_dim % max(num_heads, 1):
            problems.append(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        if activation not in ACTIVATIONS:
            problems.append(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}")
        outside = [i for i in intermediate_layers if not -num_layers <= i < num_layers]
        if outside:
            problems.append(f"intermediate_layers {outside} must lie in [{-num_layers}, {num_layers})")
        problems += ratio_problems(supported_aspect_ratios, max_num_tiles)
        if problems:
            raise ModelError(f"Mllama vision tower: {'; '.join(problems)}.")
        self.image_size, self.in_channels = image_size, in_channels
        self.feature_dim = decoder_dim
        self.max_num_tiles = max_num_tiles
        self.pad_tokens_to = pad_tokens_to
        self.aspect_ratios = [(int(h), int(w)) for h, w in supported_aspect_ratios]
        layers = [
            _layer(embed_dim, num_heads, hidden_dim, activation, norm_eps, gated=index > 0)
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
        """Features of one tile: its patches and a class token in front."""
        return int(self.clip.get_image_tokens_per_tile())

    @property
    def num_tokens(self) -> int:
        """Features of one image, those of padding tiles among them."""
        return self.max_num_tiles * self.tokens_per_tile

    def example_input(self) -> dict[str, Tensor]:
        """One black image of as few tiles as there are images of."""
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
            images: normalised pixels of tiles, ``[b, m, t, c, s, s]`` for ``m`` images a row, tiles in
                rows of their image, padding tiles behind them. With ``t`` below ``max_num_tiles``,
                black tiles are appended: the weights were trained with that many.
            aspect_ratio: (tiles high, tiles wide) of each image, ``[b, m, 2]``; (0, 0) for an image
                that pads a row. May be left out where ``t`` is 1.
            aspect_ratio_ids: in its place transformers' ids, ``[b, m]``.
            aspect_ratio_mask: which tiles are no padding, ``[b, m, t]``, True (or 1): may be attended
                to by all. None: as many as the aspect ratio says, and the first tile of an image that
                pads a row. In an image without any, everything attends to everything.

        Returns:
            Features ``[b, m * num_tokens, decoder_dim]``, image by image, tile by tile, of padding
            tiles too: the encoder mask hides them (``encoder_mask_of_tiles``).

        Raises:
            ModelError: for shapes that do not fit, and, on the CPU, for an aspect ratio that is not
                supported or has more tiles than ``images``. Elsewhere looking would wait for the
                device, so there the device asserts it.
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
        """The aspect ratio's id and the number of tiles of every image."""
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
            problems.append("aspect_ratio and aspect_ratio_ids say the same; give one of them")
        if ratio is None and ids is None and (shape[2] > 1 or (1, 1) not in self.aspect_ratios):
            problems.append(f"give aspect_ratio [b, m, 2], without which {shape[2]} tiles are ambiguous")
        for name, given, wanted in (
            ("aspect_ratio", ratio, [*shape[:2], 2]),
            ("aspect_ratio_ids", ids, shape[:2]),
            ("aspect_ratio_mask", mask, shape[:3]),
        ):
            if given is not None and list(given.shape) != wanted:
                problems.append(f"{name} must have shape {wanted}, got {list(given.shape)}")
        if problems:
            raise ModelError(f"Mllama vision tower, images {shape}: {'; '.join(problems)}.")


class TiledVisionTransformer(VisionTransformer):
    """torchtune's transformer with padding tokens, a mask, and embeddings by the id of aspect ratios."""

    hidden_layers: list[int]
    num_padding: int

    def attention_mask(self, tiles: Tensor) -> Tensor:
        """What may attend to what, ``[n, s, s]``, True: may attend, for valid tiles ``[n, t]``."""
        num_tokens = self.get_image_tokens_per_tile()
        token = torch.arange(num_tokens + self.num_padding, device=tiles.device) < num_tokens
        valid = (tiles.unsqueeze(-1) & token).flatten(1)  # [n, s]
        # Without any valid token a softmax would be over nothing.
        valid = valid | ~valid.any(dim=1, keepdim=True)
        return valid.unsqueeze(2) | valid.unsqueeze(1)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the tower up to the projection.

        Args:
            images: ``[b, m, t, c, s, s]``.
            ids: of aspect ratios, ``[b, m]``.
            mask: as ``attention_mask`` makes it, ``[b * m, ..]``.

        Returns:
            The last state ``[b, m, t, tokens and padding, d]`` and the hidden states, shaped alike.
        """
        ids = ids.flatten()  # [n], n = b * m
        x = self.conv(images.flatten(0, 2)).flatten(2).transpose(1, 2)
        x = self.pre_tile_pos_embed(x.unflatten(0, (len(ids), -1)), ids)  # [n, t, patches, d]
        x = self.token_pos_embedding(self.cls_token_embedding(x), ids)
        x = F.pad(self.ln_pre(x), (0, 0, 0, self.num_padding))
        tiled = x.shape
        x = x.flatten(1, 2)
        hidden: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            x = layer(x, mask=mask)
            if index in self.hidden_layers:
                hidden[index] = x.reshape(*images.shape[:3], *tiled[2:])
        x = self.post_tile_pos_embed(self.ln_post(x).reshape(tiled), ids)
        return x.reshape(*images.shape[:3], *tiled[2:]), [hidden[index] for index in self.hidden_layers]


class MaskedProjectionHead(Llama3VisionProjectionHead):
    """torchtune's projection head with a mask."""

    def forward(self, x: Tensor, hidden_states: Sequence[Tensor], *, mask: Tensor) -> Tensor:
        """Run the gated layers, and project their output and the hidden states.

        Args:
            x: ``[b, m, t, n, d]``.
            hidden_states: as many as the head was made for, each shaped as ``x``.
            mask: ``[b * m, t * n, t * n]``, True: may attend.

        Returns:
            Features ``[b, m * t * n, decoder_dim]``.
        """
        tiled = x.shape
        x = x.flatten(2, 3).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, mask=mask)
        x = x.reshape(tiled)
        if hidden_states:  # the k-th number of every state side by side, as in the weights
            x = torch.cat([x, torch.stack(list(hidden_states), dim=-1).flatten(-2)], dim=-1)
        return self.output(x).flatten(1, 3)


class TileEmbedding(nn.Module):
    """An embedding of each tile of an image, behind a gate that starts closed.

    Args:
        shape: ``(ids + 1, max_num_tiles, 1, d)``.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(shape[-1] ** -0.5 * torch.randn(shape))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Add to ``x`` ``[n, t, tokens, d]`` what belongs to the ids ``[n]``."""
        return x + _rows(self.embedding, ids) * self.gate.tanh()


class TiledTokenEmbedding(nn.Module):
    """An embedding of each token, one share for all tiles and one of its own for each tile.

    Args:
        shape: ``(ids + 1, max_num_tiles, tokens, d)``.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        scale = shape[-1] ** -0.5
        self.local_token_positional_embedding = nn.Parameter(scale * torch.randn(shape[2:]))
        self.global_token_positional_embedding = nn.Parameter(scale * torch.randn(shape))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Add to ``x`` ``[n, t, tokens, d]`` what belongs to the ids ``[n]``."""
        gate = self.gate.tanh()
        x = x + (1 - gate) * self.local_token_positional_embedding
        return x + gate * _rows(self.global_token_positional_embedding, ids)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table.flatten(1)).unflatten(1, table.shape[1:])


def _layer(
    embed_dim: int, num_heads: int, hidden_dim: int, activation: str, norm_eps: float, *, gated: bool
) -> TransformerSelfAttentionLayer:
    return TransformerSelfAttentionLayer(
        attn=MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=embed_dim // num_heads,
            q_proj=nn.Linear(embed_dim, embed_dim, bias=False),
            k_proj=nn.Linear(embed_dim, embed_dim, bias=False),
            v_proj=nn.Linear(embed_dim, embed_dim, bias=False),
            output_proj=nn.Linear(embed_dim, embed_dim, bias=False),
            is_causal=False,
        ),
        mlp=clip_mlp(
            in_dim=embed_dim,
            out_dim=embed_dim,
            hidden_dim=hidden_dim,
            activation=ACTIVATIONS[activation](),
        ),
        sa_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
        mlp_norm=Fp32LayerNorm(embed_dim, eps=norm_eps),
        sa_scale=TanhGate() if gated else None,
        mlp_scale=TanhGate() if gated else None,
    )
