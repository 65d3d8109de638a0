"""The transformers of Llama 3.2 Vision's tower: torchtune's, with a mask, padding tokens and tables.

Layers, gates, norms and parameter names are torchtune's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.llama3_2_vision._encoder import Llama3VisionProjectionHead
from torchtune.modules import VisionTransformer

__all__ = ["MaskedProjectionHead", "TileEmbedding", "TiledTokenEmbedding", "TiledVisionTransformer"]


class TiledVisionTransformer(VisionTransformer):
    """torchtune's transformer with padding tokens, a mask, and embeddings by aspect-ratio id."""

    hidden_layers: list[int]
    num_padding: int

    def attention_mask(self, tiles: Tensor) -> Tensor:
        """Return the attention mask ``[n, s, s]``, True: may attend, for valid tiles ``[n, t]``."""
        num_tokens = self.get_image_tokens_per_tile()
        token = torch.arange(num_tokens + self.num_padding, device=tiles.device) < num_tokens
        valid = (tiles.unsqueeze(-1) & token).flatten(1)  # [n, s]
        # In an image without a valid token everything is valid, so that no softmax is empty.
        valid = valid | ~valid.any(dim=1, keepdim=True)
        return valid.unsqueeze(2) | valid.unsqueeze(1)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the tower up to the projection.

        Args:
            images: ``[b, m, t, c, s, s]``.
            ids: of aspect ratios, ``[b, m]``.
            mask: from ``attention_mask``, ``[b * m, ..]``, True: may attend.

        Returns:
            The last state ``[b, m, t, tokens and padding, d]`` and the hidden states of the same shape.
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
            hidden_states: ``num_hidden_inputs`` tensors, each of the shape of ``x``.
            mask: ``[b * m, t * n, t * n]``, True: may attend.

        Returns:
            Features ``[b, m * t * n, decoder_dim]``.
        """
        tiled = x.shape
        x = x.flatten(2, 3).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, mask=mask)
        x = x.reshape(tiled)
        if hidden_states:  # the weights expect channel k of every state side by side
            x = torch.cat([x, torch.stack(list(hidden_states), dim=-1).flatten(-2)], dim=-1)
        return self.output(x).flatten(1, 3)


class TileEmbedding(nn.Module):
    """An embedding of each tile of an image, with a gate that starts at zero.

    Args:
        shape: ``(ids + 1, max_num_tiles, 1, d)``.
    """

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(shape[-1] ** -0.5 * torch.randn(shape))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Add the embeddings of the ids ``[n]`` to ``x`` ``[n, t, tokens, d]``."""
        return x + _rows(self.embedding, ids) * self.gate.tanh()


class TiledTokenEmbedding(nn.Module):
    """An embedding of each token: one part shared by all tiles, one for each tile, mixed by a gate.

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
        """Add the embeddings of the ids ``[n]`` to ``x`` ``[n, t, tokens, d]``."""
        gate = self.gate.tanh()
        x = x + (1 - gate) * self.local_token_positional_embedding
        return x + gate * _rows(self.global_token_positional_embedding, ids)


def _rows(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table.flatten(1)).unflatten(1, table.shape[1:])
