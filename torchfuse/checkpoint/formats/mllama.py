"""Llama 3.2 Vision as Hugging Face saves it, which calls it Mllama.

Here that is a ``cross_attention`` model. Hugging Face counts the cross-attention layers among the
decoder's; here each stands in front of the decoder layer that follows it. Rows of the embedding behind
those that the head scores are the fusion embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable, Numbers
from torchfuse.checkpoint.formats.llama import Llama, feed_forward_entries
from torchfuse.checkpoint.formats.mllama_vision import MllamaVision
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec, setting
from torchfuse.errors import CheckpointError
from torchfuse.models.base import FusedModel
from torchfuse.naming import unwrap

__all__ = ["NEW_TOKENS", "Mllama"]

NEW_TOKENS: Final = 8  # rows that the embedding has and the head has not
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


@dataclass(frozen=True)
class Mllama(ModelSpec):
    """A whole Llama 3.2 Vision.

    Attributes:
        text: the decoder without its cross-attention layers.
        vision: the tower and the projection behind it.
        fused: the decoder layers in front of which a cross-attention layer stands.
    """

    name = "mllama"
    model_types = frozenset({"mllama"})

    text: Llama
    vision: MllamaVision
    fused: tuple[int, ...] = setting("cross_attention_layers")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mllama:
        given = Settings(config, cls.name)
        text = given.section("text_config")
        said = {k: v for k, v in text.values.items() if v is not None}
        total = text.count("num_hidden_layers", 40)
        crossing = sorted(text.counts("cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38]))
        fused = tuple(layer - before for before, layer in enumerate(crossing))
        own = total - len(crossing)
        if len(set(fused)) != len(crossing) or not fused or max(fused) >= own:
            text.problem(
                f"cross_attention_layers={crossing} cannot be expressed here: each must have a decoder "
                f"layer right behind it, and there must be one at least ({total} layers in all)"
            )
        text.refuse_unless("tie_word_embeddings", False)
        given.section("vision_config")
        given.done()
        llama = Llama.from_config({**_TEXT_DEFAULTS, **said, "num_hidden_layers": own})
        vision = {**config["vision_config"], "decoder_dim": llama.embed_dim}
        return cls(llama, MllamaVision.from_config(vision), fused)

    @classmethod
    def of(cls, module: nn.Module) -> Mllama:
        model: Any = cls.parts_of(module, arch="cross_attention")
        problems: list[str] = []
        if model.get_adapter("encoder") is not None:
            problems.append("the adapter: there is none beside the tower's projection")
        text = cls.spec_of(model.decoder, (Llama,), "the decoder", problems)
        vision = cls.spec_of(model.encoder, (MllamaVision,), "the encoder", problems)
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
                f"{name}={options[name]} of the fused layers: they are as the decoder's layers, {value}"
                for name, value in wanted.items()
                if options[name] != value
            ]
            if text.tied:
                problems.append("the tied head: it has fewer rows than the embedding")
        if isinstance(vision, MllamaVision) and vision.pad_tokens_to != 8:
            problems.append(f"pad_tokens_to={vision.pad_tokens_to} of the tower: it is always 8")
        if problems:
            raise CheckpointError(cls.cannot_hold(problems))
        assert isinstance(text, Llama)
        assert isinstance(vision, MllamaVision)
        return cls(text, vision, tuple(options["layers"]))

    def to_export(self, module: nn.Module) -> Mllama:
        model: Any = unwrap(module)
        embedded = self.text.to_export(unwrap(model.decoder)).vocab_size
        scored = getattr(unwrap(model.decoder).output, "out_features", self.text.vocab_size)
        rows = max(scored, embedded - NEW_TOKENS)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, vocab_size=rows))

    def to_config(self) -> dict[str, Any]:
        crossing = [layer + before for before, layer in enumerate(self.fused)]
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
                "pad_token_id": None,  # theirs by default may lie outside the vocabulary
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

    def table(self) -> KeyTable:
        text = self.text.table()
        own, crossing = self._own_numbers(), self._crossing_numbers()
        entries = tuple(
            dataclasses.replace(entry, numbers=own) if "{}" in entry.theirs else entry
            for entry in text.entries
        )
        there, here = "model.layers.{}.", "layers.{}.fusion_layer."
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
        entries += tuple(Entry(there + t, here + o, numbers=crossing) for t, o in names.items())
        entries += tuple(
            dataclasses.replace(entry, numbers=crossing)
            for entry in feed_forward_entries(there + "mlp.", here + "mlp.")
        )
        decoder = dataclasses.replace(text, entries=entries).under(_DECODER, "decoder.")
        vision = self.vision.table().under("", "encoder.")
        return (decoder + vision).spelled(
            # As the modules are called since transformers 4.52.
            ("model.language_model.", _DECODER + "model."),
            ("model.vision_model.", "vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", _DECODER + "lm_head."),
        )

    def rows(self) -> dict[str, int]:
        return {
            "decoder.tok_embeddings.weight": self.text.vocab_size + NEW_TOKENS,
            "decoder.output.weight": self.text.vocab_size,
        }

    def _own_numbers(self) -> Numbers:
        """Numbers of decoder layers: theirs count the cross-attention layers in front, too."""
        crossing = [layer + before for before, layer in enumerate(self.fused)]

        def read(number: int) -> int | None:
            return None if number in crossing else number - sum(c < number for c in crossing)

        return Numbers(read, lambda number: number + sum(layer <= number for layer in self.fused))

    def _crossing_numbers(self) -> Numbers:
        """Numbers of cross-attention layers: ours are those of the decoder layer behind."""
        ours = {layer + before: layer for before, layer in enumerate(self.fused)}
        theirs = {layer: number for number, layer in ours.items()}
        return Numbers(ours.get, theirs.get)
