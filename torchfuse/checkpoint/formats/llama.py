r"""Llama as Hugging Face saves it, and torchtune's names for it.

The one thing that is more than a name: torchtune rotates neighbouring pairs of each head, as Meta's
code does, Hugging Face the two halves, so rows of the query and key projections are reordered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable, Layout
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, setting, shown_by_shapes
from torchfuse.errors import CheckpointError

__all__ = ["Llama", "feed_forward_entries", "rotary_layout"]

# Llama 3.1's scaling of the rotary embedding: their name, ours, and what the unscaled one has.
_SCALING: Final = {
    "factor": ("scale_factor", 1.0),
    "low_freq_factor": ("low_freq_factor", 1.0),
    "high_freq_factor": ("high_freq_factor", 4.0),
    "original_max_position_embeddings": ("old_context_len", 8192.0),
}


def rotary_layout(head_dim: int) -> Layout:
    """Rows ``[heads * head_dim, d]`` of a rotated projection: by halves there, by pairs here."""

    def swap(weight: Tensor, there: tuple[int, int]) -> Tensor:
        return weight.unflatten(0, (-1, *there)).transpose(1, 2)  # [heads, .., .., d]

    half = head_dim // 2
    return Layout(
        lambda weight: swap(weight, (2, half)), lambda weight: swap(weight, (half, 2)).flatten(0, 2)
    )


def feed_forward_entries(theirs: str, ours: str) -> tuple[Entry, ...]:
    """The three maps of a gated feed-forward, below these names."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    return tuple(Entry(f"{theirs}{t}.weight", f"{ours}{o}.weight") for t, o in names.items())


@dataclass(frozen=True)
class Llama(Spec):
    """A Llama decoder: torchtune's ``TransformerDecoder`` of Llama 2, 3, 3.1 or 3.2.

    What a configuration does not say is as transformers has it, whose files leave defaults out.
    """

    name = "Llama"
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
            given.problem(f"num_attention_heads={num_heads} must divide hidden_size={embed_dim}")
        num_kv_heads = given.count("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            given.problem(
                f"num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}"
            )
        head_dim = given.count("head_dim", max(1, embed_dim // num_heads))
        if head_dim % 2:
            given.problem(f"head_dim={head_dim} must be even to be rotated")
        for key, only in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
            given.refuse_unless(key, only)
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
            **_rope_from(given),
        )
        given.done()
        return spec

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return hasattr(module, "tok_embeddings") and hasattr(module, "layers")

    @classmethod
    def of(cls, module: nn.Module) -> Llama:
        decoder: Any = module
        try:
            attentions = [layer.attn for layer in decoder.layers]
            norms = [decoder.norm, *(n for x in decoder.layers for n in (x.sa_norm, x.mlp_norm))]
            shapes = {(attn.num_heads, attn.num_kv_heads, attn.head_dim) for attn in attentions}
            ropes = {tuple(_rope_of(attn.pos_embeddings).items()) for attn in attentions}
            eps = {norm.eps for norm in norms}
            mlp = decoder.layers[0].mlp
            activations = {type(layer.mlp.activation).__name__ for layer in decoder.layers} - {"SiLU"}
            if activations or max(len(shapes), len(ropes), len(eps)) > 1:
                raise CheckpointError(
                    f"A {type(module).__name__} is no Llama: layers differ in heads {sorted(shapes)}, "
                    f"rotary embedding or epsilon {sorted(eps)}, or their activation is no SiLU "
                    f"({', '.join(activations) or 'it is'})."
                )
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
        rope: dict[str, Any] = {"rope_theta": self.rope_base, "rope_type": "default"}
        if self.scale_factor != 1:
            rope["rope_type"] = "llama3"
            rope |= {theirs: getattr(self, ours) for theirs, (ours, _) in _SCALING.items()}
            rope["original_max_position_embeddings"] = int(self.old_context_len)
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
            "rope_parameters": rope,
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

    def to_export(self, module: nn.Module) -> Llama:
        embedding: Any = module.tok_embeddings
        return dataclasses.replace(self, vocab_size=embedding.num_embeddings)

    def rows(self) -> dict[str, int]:
        return dict.fromkeys(("tok_embeddings.weight", "output.weight"), self.vocab_size)

    def depth(self) -> int:
        return self.num_layers

    def table(self) -> KeyTable:
        there, here = "model.layers.{}.", "layers.{}."
        rotated = rotary_layout(self.head_dim)
        return KeyTable(
            entries=(
                Entry("model.embed_tokens.weight", "tok_embeddings.weight"),
                Entry(there + "input_layernorm.weight", here + "sa_norm.scale"),
                Entry(there + "post_attention_layernorm.weight", here + "mlp_norm.scale"),
                Entry(there + "self_attn.q_proj.weight", here + "attn.q_proj.weight", rotated),
                Entry(there + "self_attn.k_proj.weight", here + "attn.k_proj.weight", rotated),
                Entry(there + "self_attn.v_proj.weight", here + "attn.v_proj.weight"),
                Entry(there + "self_attn.o_proj.weight", here + "attn.output_proj.weight"),
                *feed_forward_entries(there + "mlp.", here + "mlp."),
                Entry("model.norm.weight", "norm.scale"),
                Entry("lm_head.weight", "output.weight"),
            ),
            # A LlamaModel without head is saved without the first component.
            spellings=tuple((name, "model." + name) for name in ("embed_tokens.", "layers.", "norm.")),
            # Computed, not learned; files of early transformers hold them.
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


def _rope_from(given: Settings) -> dict[str, float]:
    """The rotary embedding, from either spelling of the configuration."""
    new, old = (given.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(new, Mapping) or not isinstance(old, Mapping):
        given.problem(f"rope_parameters and rope_scaling must be sections, got {new!r} and {old!r}")
        new = old = {}
    said = {"rope_theta": given.values.get("rope_theta"), **old}
    rope = Settings(said | {k: v for k, v in new.items() if v is not None}, "")
    rope.refuse_unless("partial_rotary_factor", 1.0)
    values = {"rope_base": rope.number("rope_theta", 10_000.0)}
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    scaled = kind == "llama3"
    if not scaled and kind != "default":
        given.problem(f"rope type {kind!r} cannot be expressed here, only 'default' and 'llama3'")
    for theirs, (ours, unscaled) in _SCALING.items():
        values[ours] = float(rope.number(theirs)) if scaled else unscaled
    for problem in rope.problems:
        given.problem(f"rope: {problem}")
    return values


def _rope_of(rope: Any) -> dict[str, float]:
    """The rotary embedding of an attention module, under the names of the fields."""
    if rope is None or type(rope).__name__ not in ("RotaryPositionalEmbeddings", "Llama3ScaledRoPE"):
        raise CheckpointError(f"Rotary embeddings of type {type(rope).__name__} are not Llama's.")
    values = {"rope_base": float(rope.base)}
    scaled = float(getattr(rope, "scale_factor", 1)) != 1
    for ours, unscaled in _SCALING.values():
        values[ours] = float(getattr(rope, ours)) if scaled else unscaled
    return values
