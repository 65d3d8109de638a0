"""Llama as Hugging Face saves it, with torchtune's names for its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.rope import (
    rope_from_config,
    rope_from_module,
    rope_to_config,
    rotary_layout,
)
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, setting, shown_by_shapes
from torchfuse.errors import CheckpointError

__all__ = ["Llama", "feed_forward_entries"]


def feed_forward_entries(source: str, target: str) -> tuple[Entry, ...]:
    """Return the entries of a gated feed-forward, below these prefixes."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    return tuple(Entry(f"{source}{s}.weight", f"{target}{t}.weight") for s, t in names.items())


@register_format("decoder")
@dataclass(frozen=True)
class Llama(Spec):
    """A Llama decoder: torchtune's ``TransformerDecoder`` of Llama 2, 3, 3.1 or 3.2.

    Settings that a configuration lacks have the defaults of transformers, whose files leave them out.
    """

    name = "llama"
    model_types = frozenset({"llama"})

    vocab_size: int = shown_by_shapes()
    num_layers: int = shown_by_shapes()
    embed_dim: int = shown_by_shapes()
    intermediate_dim: int = shown_by_shapes()
    max_seq_len: int = shown_by_shapes()
    tied: bool = shown_by_shapes()
    num_heads: int = setting("num_attention_heads")
    num_kv_heads: int = setting("num_key_value_heads")
    head_dim: int = setting("head_dim")
    norm_eps: float = setting("rms_norm_eps")
    rope_base: float = setting("rope base")
    scale_factor: float = setting("rope scale_factor")
    low_freq_factor: float = setting("rope low_freq_factor")
    high_freq_factor: float = setting("rope high_freq_factor")
    old_context_len: float = setting("rope old_context_len")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llama:
        given = Settings(config, cls.name)
        embed_dim = given.count("hidden_size", 4096)
        num_heads = given.count("num_attention_heads", 32)
        if embed_dim % num_heads:
            given.problems.append(f"num_attention_heads={num_heads} must divide hidden_size={embed_dim}")
        num_kv_heads = given.count("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            given.problems.append(
                f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}"
            )
        head_dim = given.count("head_dim", max(1, embed_dim // num_heads))
        if head_dim % 2:
            given.problems.append(f"head_dim={head_dim} must be even to be rotated")
        for key, only in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
            given.allow_only(key, only)
        spec = cls(
            vocab_size=given.count("vocab_size", 32_000),
            num_layers=given.count("num_hidden_layers", 32),
            embed_dim=embed_dim,
            intermediate_dim=given.count("intermediate_size", 11_008),
            max_seq_len=given.count("max_position_embeddings", 2048),
            tied=given.flag("tie_word_embeddings", False),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=given.number("rms_norm_eps", 1e-6),
            **rope_from_config(given),
        )
        given.raise_problems()
        return spec

    @classmethod
    def matches_module(cls, module: nn.Module) -> bool:
        return hasattr(module, "tok_embeddings") and hasattr(module, "layers")

    @classmethod
    def from_module(cls, module: nn.Module) -> Llama:
        decoder: Any = module
        try:
            attentions = [layer.attn for layer in decoder.layers]
            norms = [decoder.norm, *(n for x in decoder.layers for n in (x.sa_norm, x.mlp_norm))]
            shapes = {(attn.num_heads, attn.num_kv_heads, attn.head_dim) for attn in attentions}
            ropes = {tuple(rope_from_module(attn.pos_embeddings).items()) for attn in attentions}
            eps = {norm.eps for norm in norms}
            mlp = decoder.layers[0].mlp
            activations = {type(layer.mlp.activation).__name__ for layer in decoder.layers}
            per_layer: dict[str, Any] = {"heads": shapes, "rotary embedding": ropes, "epsilon": eps}
            problems = [
                f"layers differ in {what}, {sorted(values)}"
                for what, values in per_layer.items()
                if len(values) > 1
            ]
            problems += [f"the activation is {name}, not SiLU" for name in activations - {"SiLU"}]
            if problems:
                raise CheckpointError(f"A {type(module).__name__} is no Llama: {'; '.join(problems)}.")
            ((num_heads, num_kv_heads, head_dim),) = shapes
            return cls(
                vocab_size=decoder.tok_embeddings.weight.shape[0],
                num_layers=len(decoder.layers),
                embed_dim=decoder.tok_embeddings.weight.shape[1],
                intermediate_dim=mlp.w1.weight.shape[0],
                max_seq_len=decoder.max_seq_len,
                tied=not isinstance(decoder.output, nn.Module),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                norm_eps=eps.pop(),
                **dict(next(iter(ropes))),
            )
        except (AttributeError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"A {type(module).__name__} is no Llama: it lacks what torchtune's has ({error})."
            ) from error

    def to_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.intermediate_dim,
            "max_position_embeddings": self.max_seq_len,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": rope_to_config(self),
            "tie_word_embeddings": self.tied,
            "attention_bias": False,
            "mlp_bias": False,
        }

    def build(self) -> nn.Module:
        from torchfuse.models.decoders.llama import llama_decoder  # imports torchtune

        return llama_decoder(
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            embed_dim=self.embed_dim,
            max_seq_len=self.max_seq_len,
            intermediate_dim=self.intermediate_dim,
            norm_eps=self.norm_eps,
            tie_word_embeddings=self.tied,
            rope_base=self.rope_base,
            rope_scale_factor=self.scale_factor,
            rope_low_freq_factor=self.low_freq_factor,
            rope_high_freq_factor=self.high_freq_factor,
            rope_old_context_len=self.old_context_len,
        )

    def for_export(self, module: nn.Module) -> Llama:
        embedding: Any = module.tok_embeddings
        return dataclasses.replace(self, vocab_size=embedding.num_embeddings)

    def padded_rows(self) -> dict[str, int]:
        return dict.fromkeys(("tok_embeddings.weight", "output.weight"), self.vocab_size)

    def key_table(self) -> KeyTable:
        source, target = "model.layers.{}.", "layers.{}."
        rotated = rotary_layout(self.head_dim)
        return KeyTable(
            entries=(
                Entry("model.embed_tokens.weight", "tok_embeddings.weight"),
                Entry(source + "input_layernorm.weight", target + "sa_norm.scale"),
                Entry(source + "post_attention_layernorm.weight", target + "mlp_norm.scale"),
                Entry(source + "self_attn.q_proj.weight", target + "attn.q_proj.weight", rotated),
                Entry(source + "self_attn.k_proj.weight", target + "attn.k_proj.weight", rotated),
                Entry(source + "self_attn.v_proj.weight", target + "attn.v_proj.weight"),
                Entry(source + "self_attn.o_proj.weight", target + "attn.output_proj.weight"),
                *feed_forward_entries(source + "mlp.", target + "mlp."),
                Entry("model.norm.weight", "norm.scale"),
                Entry("lm_head.weight", "output.weight"),
            ),
            # A LlamaModel without head is saved without the first component.
            aliases=tuple((name, "model." + name) for name in ("embed_tokens.", "layers.", "norm.")),
            # Computed buffers, in files of early versions of transformers.
            ignored=(
                r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
                r"model\.rotary_emb\.inv_freq",
                r"rotary_emb\.inv_freq",
            ),
            tied={"output.weight": "tok_embeddings.weight"},
            appended={
                "tok_embeddings.fusion_embedding.weight": "tok_embeddings.weight",
                "output.fusion_linear.weight": "output.weight",
            },
        )
