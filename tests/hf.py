"""Small checkpoints, as transformers saves them, and torchfuse models of the same sizes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from torchfuse.models.builders import llama_clip

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 61,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,
}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 12,
    "patch_size": 4,
    "initializer_range": 0.3,
}
# The same sizes under the names of torchfuse's builder.
FUSED = {
    "vocab_size": 37,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "max_seq_len": 61,
    "intermediate_dim": 41,
    "tie_word_embeddings": False,
    "image_size": 12,
    "patch_size": 4,
    "vision_embed_dim": 20,
    "vision_num_layers": 3,
    "vision_num_heads": 5,
    "vision_hidden_dim": 43,
    "every": 2,
}


def fused_model(**changes: Any) -> Any:
    """A fused model of these sizes, with fresh weights."""
    return llama_clip(**FUSED | changes)


def llama(folder: Path, *, shard: str = "5GB", **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(23)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).eval()
    _shake_norms(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def clip_tower(folder: Path, *, old: bool = False, **changes: Any) -> CLIPVisionModel:
    torch.manual_seed(29)
    model = CLIPVisionModel(CLIPVisionConfig(**VISION | changes)).eval()
    _shake_norms(model)
    model.save_pretrained(folder)
    if old:  # the keys of older files, which also have a buffer
        rename(folder, lambda key: f"vision_model.{key}", extra="vision_model.embeddings.position_ids")
    return model


def whole_clip(folder: Path, **changes: Any) -> CLIPModel:
    torch.manual_seed(31)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=19, num_hidden_layers=1, num_attention_heads=2
    )
    vision = CLIPVisionConfig(**VISION | changes)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    _shake_norms(model)
    model.save_pretrained(folder)
    return model


MLLAMA_TEXT = LLAMA | {
    "num_hidden_layers": 5,
    "cross_attention_layers": [1, 3],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLLAMA_VISION = {
    "hidden_size": 20,
    "intermediate_size": 43,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 5,
    "image_size": 12,
    "patch_size": 4,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 60,
    "max_num_tiles": 4,
    "initializer_range": 0.3,
}


def llava(folder: Path, *, text: Any = (), vision: Any = None, **changes: Any) -> Any:
    """A LLaVA whose image token is the last of its vocabulary."""
    torch.manual_seed(37)
    vision_config = CLIPVisionConfig(**VISION).to_dict() if vision is None else vision
    config = LlavaConfig(
        text_config=LlamaConfig(**LLAMA | dict(text)).to_dict(),
        vision_config=vision_config,
        image_token_index=LLAMA["vocab_size"] - 1,
        **changes,
    )
    model = LlavaForConditionalGeneration(config).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


def mllama(folder: Path, *, text: Any = (), vision: Any = (), shard: str = "5GB") -> Any:
    """A Llama 3.2 Vision whose gates are open, and whose embeddings of tiles all differ."""
    torch.manual_seed(41)
    config = MllamaConfig(
        text_config={"model_type": "mllama_text_model", **MLLAMA_TEXT, **dict(text)},
        vision_config={"model_type": "mllama_vision_model", **MLLAMA_VISION, **dict(vision)},
        image_token_index=LLAMA["vocab_size"],
    )
    model = MllamaForConditionalGeneration(config).eval()
    shake(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def drop_attention_without_images(monkeypatch: Any, attends: torch.Tensor) -> None:
    """Change transformers' Mllama to Meta's code: text without images gets nothing from cross-attention.

    transformers drops the feed-forward of such text, but adds its attention, which then is over all
    images (its issue 39379). Here the attention is dropped too, which is the only change.

    Args:
        monkeypatch: pytest's.
        attends: which prompt tokens attend to any image, ``[b, s]``; new tokens do as the last one.
    """
    forward = MllamaTextCrossAttention.forward

    def masked(self, *args, **kwargs):
        attended, weights = forward(self, *args, **kwargs)
        return attended * attends[:, -attended.shape[1] :, None].to(attended.dtype), weights

    monkeypatch.setattr(MllamaTextCrossAttention, "forward", masked)


@torch.no_grad()
def shake(model: Any) -> None:
    """Randomize norms, gates, biases and embeddings, whose equal initial values hide swapped tensors."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("norm", "gate", "bias", "embedding")):
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def _shake_norms(model: Any) -> None:
    """Randomize norms, whose initial ones and zeros hide a swapped pair."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))


def rename(folder: Path, new: Any, extra: str | None = None) -> None:
    file = folder / "model.safetensors"
    tensors = {new(key): value for key, value in load_file(file).items()}
    if extra:
        tensors[extra] = torch.arange(10)
    save_file(tensors, file)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | changes))


def random_llama_config(seed: int) -> dict[str, Any]:
    """Draw a Llama: grouped queries, wide heads, tied heads, either kind of rotary embedding."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 3])
    rope: dict[str, Any] = {"rope_theta": draw.choice([1e4, 5e5, 31_000.0]), "rope_type": "default"}
    if draw.random() < 0.5:
        rope |= {
            "rope_type": "llama3",
            "factor": draw.choice([8.0, 32.0]),
            "low_freq_factor": draw.choice([1.0, 2.0]),
            "high_freq_factor": draw.choice([4.0, 5.0]),
            "original_max_position_embeddings": draw.choice([16, 8192]),
        }
    return {
        "vocab_size": draw.choice([37, 41, 53]),
        "hidden_size": heads * draw.choice([4, 6]),
        "head_dim": draw.choice([4, 6, 8]),
        "intermediate_size": draw.choice([29, 41]),
        "num_hidden_layers": draw.choice([2, 3, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 97,
        "rms_norm_eps": draw.choice([1e-5, 1e-6]),
        "rope_parameters": rope,
        "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": 0.3,
    }


def random_tower_config(seed: int) -> dict[str, Any]:
    """Draw the sizes of a vision transformer."""
    draw = random.Random(1000 + seed)
    heads = draw.choice([2, 3, 5])
    patch = draw.choice([3, 4])
    return {
        "hidden_size": heads * draw.choice([4, 6]),
        "intermediate_size": draw.choice([23, 43]),
        "num_hidden_layers": draw.choice([2, 3, 4]),
        "num_attention_heads": heads,
        "image_size": patch * draw.choice([2, 3, 4]),
        "patch_size": patch,
        "initializer_range": 0.3,
    }
