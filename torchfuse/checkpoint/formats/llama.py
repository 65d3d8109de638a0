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
from torchfuse.checkpoint.formats.spec import Spec, parsed, setting
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

    vocab_size: int = setting("vocab_size", 32_000, shown_by_shapes=True)
    num_layers: int = setting("num_hidden_layers", 32, shown_by_shapes=True)
    embed_dim: int = setting("hidden_size", 4096, shown_by_shapes=True)
    intermediate_dim: int = setting("intermediate_size", 11_008, shown_by_shapes=True)
    max_seq_len: int = setting("max_position_embeddings", 2048, shown_by_shapes=True)
    tie_word_embeddings: bool = setting("tie_word_embeddings", False, shown_by_shapes=True)
    num_heads: int = setting("num_attention_heads", 32)
    num_kv_heads: int = setting("num_key_value_heads", lambda values: values["num_heads"])
    head_dim: int = setting("head_dim", lambda values: values["embed_dim"] // values["num_heads"] or 1)
    norm_eps: float = setting("rms_norm_eps", 1e-6)
    rope_base: float = parsed("rope base")
    rope_scale_factor: float = parsed("rope scale_factor")
    rope_low_freq_factor: float = parsed("rope low_freq_factor")
    rope_high_freq_factor: float = parsed("rope high_freq_factor")
    rope_old_context_len: float = parsed("rope old_context_len")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llama:
        given = Settings(config, cls.name)
        for key, only in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
            given.allow_only(key, only)
        spec = cls(**cls.read_settings(given), **rope_from_config(given))
        embed_dim, num_heads, num_kv_heads = spec.embed_dim, spec.num_heads, spec.num_kv_heads
        if embed_dim % num_heads:
            given.problems.append(f"num_attention_heads={num_heads} must divide hidden_size={embed_dim}")
        if num_heads % num_kv_heads:
            given.problems.append(
                f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}"
            )
        if spec.head_dim % 2:
            given.problems.append(f"head_dim={spec.head_dim} must be even to be rotated")
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
                tie_word_embeddings=not isinstance(decoder.output, nn.Module),
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
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": rope_to_config(dataclasses.asdict(self)),
            **self.written_settings(),
        }

    def build(self) -> nn.Module:
        from torchfuse.models.decoders.llama import llama_decoder  # imports torchtune

        return llama_decoder(**dataclasses.asdict(self))

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
