"""Llama 3.2 Vision at a tiny size, built by torchtune and by torchfuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.models.llama3_2_vision import llama3_2_vision_decoder, llama3_2_vision_encoder
from torchtune.modules import model_fusion

from torchfuse import fuse
from torchfuse.encoders.mllama import MllamaVisionEncoder
from torchfuse.encoders.mllama_tiles import grid_to_table
from torchfuse.models.decoders.llama import llama_decoder

VOCAB = 37
NEW = 8
LAYERS = 6
FUSED = [1, 3, 5]
WIDTH = 24
TOKENS = 10  # of a tile: nine patches and a class token
RATIOS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
DECODER = {
    "vocab_size": VOCAB,
    "num_layers": LAYERS,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": WIDTH,
    "max_seq_len": 61,
    "intermediate_dim": 41,
}


# Embeddings of tiles: grids in torchtune, tables with one row per aspect ratio in torchfuse.
TILE_TABLES = [f"encoder.clip.{part}_tile_pos_embed.embedding" for part in ("pre", "post")] + [
    "encoder.clip.token_pos_embedding.global_token_positional_embedding"
]


def tables_of_grids(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torchtune's state dict with torchfuse's layout."""
    return {**state, **{name: grid_to_table(state[name], RATIOS, 4) for name in TILE_TABLES}}


def torchtune_encoder() -> nn.Module:
    return shake(
        llama3_2_vision_encoder(
            patch_size=4,
            num_heads=5,
            clip_embed_dim=20,
            clip_num_layers=5,
            clip_hidden_states=[1, 3],
            num_layers_projection=2,
            decoder_embed_dim=WIDTH,
            tile_size=12,
            max_num_tiles=4,
        )
    )


def torchtune_decoder(**changes: Any) -> nn.Module:
    return shake(
        llama3_2_vision_decoder(
            fusion_interval=2,
            num_special_tokens=NEW,
            encoder_max_seq_len=89,
            rope_base=500_000.0,
            **DECODER | changes,
        )
    )


def torchtune_model(**changes: Any) -> nn.Module:
    """torchtune's model, with random parameters and open gates."""
    return model_fusion.DeepFusionModel(torchtune_decoder(**changes), torchtune_encoder()).eval()


def torchfuse_decoder(**changes: Any) -> nn.Module:
    return llama_decoder(rope_base=500_000.0, rope_scale_factor=8, **DECODER | changes)


def torchfuse_encoder(**changes: Any) -> MllamaVisionEncoder:
    """The same tower; torchtune's has no padding tokens, and counts states before layers."""
    numbers: dict[str, Any] = {
        "image_size": 12,
        "patch_size": 4,
        "embed_dim": 20,
        "num_layers": 5,
        "num_global_layers": 2,
        "num_heads": 5,
        "hidden_dim": 80,
        "decoder_dim": WIDTH,
        "intermediate_layers": [0, 2],
        "max_num_tiles": 4,
        "supported_aspect_ratios": RATIOS,
        "pad_tokens_to": 1,
    }
    return MllamaVisionEncoder(**numbers | changes)


def torchfuse_model(encoder: nn.Module | None = None, **changes: Any) -> nn.Module:
    """The same model around a plain decoder; its tower is torchfuse's unless another is given."""
    return fuse(
        torchfuse_decoder(**changes),
        torchfuse_encoder() if encoder is None else encoder,
        adapter=None,
        layers=FUSED,
        fusion_vocab_size=NEW,
    ).eval()


def with_torchtune_epsilons(model: Any) -> Any:
    """Set the two norms of a fused layer to 1e-6, as torchtune's builder does; all others have 1e-5."""
    for index in FUSED:
        layer = model.decoder.layers[index].fusion_layer
        assert layer.attn.q_norm.eps == layer.attn.k_norm.eps == 1e-5
        layer.ca_norm.eps = layer.mlp_norm.eps = 1e-6
    return model


@torch.no_grad()
def shake(module: nn.Module) -> nn.Module:
    """Set random parameters, gates included."""
    for parameter in module.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.8))
    return module


def example(rows: list[list[tuple[int, int]]]) -> tuple[Tensor, dict[str, Any]]:
    """Text with new tokens, images of four tiles, and their mask.

    The first token of every row attends to nothing, and no token of the last row does.
    """
    b, s, m = len(rows), 13, len(rows[0])
    tokens = torch.randint(0, VOCAB + NEW, (b, s))
    tokens[:, 1] = VOCAB + 3
    mask = torch.rand(b, s, m * 4 * TOKENS) < 0.6
    mask[:, 0] = mask[-1] = False
    images = {"images": torch.randn(b, m, 4, 3, 12, 12), "aspect_ratio": torch.tensor(rows)}
    return tokens, {"encoder_input": images, "encoder_mask": mask}
