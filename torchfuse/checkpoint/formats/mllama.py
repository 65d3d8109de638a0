"""Llama 3.2 Vision as Hugging Face saves it, under the name Mllama.

In torchfuse that is a ``cross_attention`` model. Hugging Face counts the cross-attention layers among
the decoder's layers; torchfuse attaches each to the decoder layer that follows it. The embedding has
more rows than the head; the extra ones are the fusion embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, IndexMap, KeyTable
from torchfuse.checkpoint.formats.llama import Llama, feed_forward_entries
from torchfuse.checkpoint.formats.mllama_vision import MllamaVision
from torchfuse.checkpoint.formats.registry import read_part, register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec, parsed
from torchfuse.models.base import FusedModel
from torchfuse.naming import unwrap

__all__ = ["NEW_TOKENS", "Mllama"]

NEW_TOKENS: Final = 8  # extra rows of the embedding
_DECODER: Final = "language_model."
_TEXT_DEFAULTS: Final = {
    "vocab_size": 128_256,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}


@register_format("model")
@dataclass(frozen=True)
class Mllama(ModelSpec):
    """A whole Llama 3.2 Vision.

    Attributes:
        text: the decoder without its cross-attention layers.
        vision: the tower and the projection after it.
        fused: indices of the decoder layers that a cross-attention layer precedes.
    """

    name = "mllama"
    model_types = frozenset({"mllama"})

    text: Llama
    vision: MllamaVision
    fused: tuple[int, ...] = parsed("cross_attention_layers")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mllama:
        given = Settings(config, cls.name)
        text = given.section("text_config")
        present = {k: v for k, v in text.values.items() if v is not None}
        total = text.count("num_hidden_layers", 40)
        crossing = sorted(text.counts("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38]))
        fused = tuple(layer - before for before, layer in enumerate(crossing))
        own = total - len(crossing)
        if len(set(fused)) != len(crossing) or not fused or max(fused) >= own:
            text.problems.append(
                f"cross_attention_layers={crossing} is not supported: there must be at least one, and a "
                f"decoder layer right after each ({total} layers in all)"
            )
        text.allow_only("tie_word_embeddings", False)
        given.section("vision_config")
        given.raise_problems()
        llama = Llama.from_config({**_TEXT_DEFAULTS, **present, "num_hidden_layers": own})
        vision = {**config["vision_config"], "decoder_dim": llama.embed_dim}
        return cls(llama, MllamaVision.from_config(vision), fused)

    @classmethod
    def from_module(cls, module: nn.Module) -> Mllama:
        model: Any = cls.single_encoder_model(module, "cross_attention")
        problems: list[str] = []
        if model.get_adapter("encoder") is not None:
            problems.append("the adapter: this format has none besides the tower's projection")
        text = read_part(model.decoder, (Llama,), "the decoder", problems)
        vision = read_part(model.encoder, (MllamaVision,), "the encoder", problems)
        options: dict[str, Any] = {}
        try:
            options = model.strategy.describe(model.decoder)
        except ValueError as error:
            problems.append(f"the fused layers: {error}")
        if isinstance(text, Llama) and options:
            wanted = {
                "num_heads": text.num_heads,
                "num_kv_heads": text.num_kv_heads,
                "hidden_dim": text.intermediate_dim,
                "norm_eps": text.norm_eps,
                "qk_norm": True,
                "fusion_first": True,
            }
            problems += [
                f"{name}={options[name]} of the fused layers: it must be {value}, as in the decoder"
                for name, value in wanted.items()
                if options[name] != value
            ]
            if text.tie_word_embeddings:
                problems.append("the tied head: this format's head has fewer rows than its embedding")
        if isinstance(vision, MllamaVision) and vision.pad_tokens_to != 8:
            problems.append(f"pad_tokens_to={vision.pad_tokens_to} of the tower: it must be 8")
        if problems:
            raise cls.cannot_hold(problems)
        assert isinstance(text, Llama)
        assert isinstance(vision, MllamaVision)
        return cls(text, vision, tuple(options["layers"]))

    def for_export(self, module: nn.Module) -> Mllama:
        model: Any = unwrap(module)
        embedded = self.text.for_export(unwrap(model.decoder)).vocab_size
        scored = getattr(unwrap(model.decoder).output, "out_features", self.text.vocab_size)
        rows = max(scored, embedded - NEW_TOKENS)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, vocab_size=rows))

    def to_config(self) -> dict[str, Any]:
        crossing = self._crossing()
        text = self.text.to_config()
        del text["architectures"]
        vision = self.vision.to_config()
        del vision["decoder_dim"], vision["architectures"], vision["pad_tokens_to"]
        return {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "image_token_index": self.text.vocab_size,
            "text_config": {
                **text,
                "model_type": "mllama_text_model",
                "num_hidden_layers": self.text.num_layers + len(crossing),
                "cross_attention_layers": crossing,
                "pad_token_id": None,  # the default may lie outside the vocabulary
            },
            "vision_config": vision,
        }

    def build(self) -> FusedModel:
        from torchfuse.models.fuse import fuse

        return fuse(
            self.text.build(),
            self.vision.build(),
            arch="cross_attention",
            adapter=None,
            fusion_vocab_size=NEW_TOKENS,
            layers=list(self.fused),
            norm_eps=self.text.norm_eps,
        )

    def key_table(self) -> KeyTable:
        text = self.text.key_table()
        own, crossing = self._decoder_indices(), self._crossing_indices()
        entries = tuple(
            dataclasses.replace(entry, index_map=own) if "{}" in entry.source_key else entry
            for entry in text.entries
        )
        source, target = "model.layers.{}.", "layers.{}.fusion_layer."
        names = {
            "cross_attn_attn_gate": "ca_scale.scale",
            "cross_attn_mlp_gate": "mlp_scale.scale",
            "input_layernorm.weight": "ca_norm.scale",
            "post_attention_layernorm.weight": "mlp_norm.scale",
            "cross_attn.q_proj.weight": "attn.q_proj.weight",
            "cross_attn.k_proj.weight": "attn.k_proj.weight",
            "cross_attn.v_proj.weight": "attn.v_proj.weight",
            "cross_attn.o_proj.weight": "attn.output_proj.weight",
            "cross_attn.q_norm.weight": "attn.q_norm.scale",
            "cross_attn.k_norm.weight": "attn.k_norm.scale",
        }
        entries += tuple(Entry(source + s, target + t, index_map=crossing) for s, t in names.items())
        entries += tuple(
            dataclasses.replace(entry, index_map=crossing)
            for entry in feed_forward_entries(source + "mlp.", target + "mlp.")
        )
        decoder = dataclasses.replace(text, entries=entries).with_prefix(_DECODER, "decoder.")
        vision = self.vision.key_table().with_prefix("", "encoder.")
        return (decoder + vision).with_aliases(
            # Names of the modules since transformers 4.52.
            ("model.language_model.", _DECODER + "model."),
            ("model.vision_model.", "vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", _DECODER + "lm_head."),
        )

    def padded_rows(self) -> dict[str, int]:
        return {
            "decoder.tok_embeddings.weight": self.text.vocab_size + NEW_TOKENS,
            "decoder.output.weight": self.text.vocab_size,
        }

    def _crossing(self) -> list[int]:
        """Return the indices of the cross-attention layers among all layers."""
        return [layer + before for before, layer in enumerate(self.fused)]

    def _decoder_indices(self) -> IndexMap:
        """Map indices among all layers to indices among the decoder's own layers."""
        crossing = self._crossing()

        def to_target(index: int) -> int | None:
            return None if index in crossing else index - sum(c < index for c in crossing)

        return IndexMap(to_target, lambda index: index + sum(layer <= index for layer in self.fused))

    def _crossing_indices(self) -> IndexMap:
        """Map indices of cross-attention layers to those of the decoder layers that they precede."""
        return IndexMap.from_pairs(dict(zip(self._crossing(), self.fused, strict=True)))
