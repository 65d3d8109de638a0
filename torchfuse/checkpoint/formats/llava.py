"""LLaVA as Hugging Face saves it: a Llama, a vision tower, and two linear layers between them.

In torchfuse that is a ``joint_decoder`` model with placeholders and the adapter ``mlp_2layer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.registry import formats_of, read_part, read_spec, register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec, Spec, parsed
from torchfuse.models.base import FusedModel
from torchfuse.modules.adapters import MLP2LayerAdapter
from torchfuse.naming import unwrap

__all__ = ["Llava"]

_ACTIVATIONS: Final = {name: name for name in ("gelu", "silu", "relu")}
_SELECTED: Final = {"default": False, "full": True}
_DECODER, _TOWER, _PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."


@register_format("model")
@dataclass(frozen=True)
class Llava(ModelSpec):
    """A whole LLaVA."""

    name = "llava"
    model_types = frozenset({"llava"})

    text: Llama
    vision: Spec
    image_token: int = parsed("image_token_index")
    activation: str = parsed("projector_hidden_act")
    bias: bool = parsed("multimodal_projector_bias")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llava:
        given = Settings(config, cls.name)
        text = {"model_type": "llama", **given.section("text_config").values}
        tower = {"model_type": "clip_vision_model", **given.section("vision_config").values}
        if given.flag("tie_word_embeddings", False):
            text["tie_word_embeddings"] = True
        keep_cls = given.choice("vision_feature_select_strategy", _SELECTED, "default")
        activation = given.choice("projector_hidden_act", _ACTIVATIONS, "gelu")
        token_key = "image_token_id" if "image_token_id" in config else "image_token_index"
        image_token = given.count(token_key, 32_000, least=0)
        bias = given.flag("multimodal_projector_bias", True)
        feature_layer = given.count("vision_feature_layer", -2, least=-(2**20))
        given.raise_problems()
        llama = read_spec(text, (Llama,))
        vision = read_spec(tower, formats_of("encoder")).with_features(feature_layer, keep_cls)
        assert isinstance(llama, Llama)
        return cls(llama, vision, image_token, activation, bias)

    @classmethod
    def from_module(cls, module: nn.Module) -> Llava:
        model: Any = cls.single_encoder_model(module, "joint_decoder")
        options, adapter = model.strategy.options(), model.get_adapter("encoder")
        problems = []
        if options["placement"] != "placeholder":
            problems.append(f"placement={options['placement']!r}: LLaVA has placeholders")
        if not isinstance(adapter, MLP2LayerAdapter):
            problems.append(f"the adapter, a {type(adapter).__name__}: LLaVA's is mlp_2layer")
        elif adapter.linear_1.out_features != adapter.out_dim:
            problems.append("the adapter's hidden_dim: LLaVA's is the decoder's width")
        text = read_part(model.decoder, (Llama,), "the decoder", problems)
        vision = read_part(model.encoder, formats_of("encoder"), "the encoder", problems)
        if problems:
            raise cls.cannot_hold(problems)
        assert isinstance(text, Llama)
        assert vision is not None
        token, layers = options["encoder_token"], adapter.options()
        return cls(text, vision, token, layers["activation"], layers["bias"])

    def for_export(self, module: nn.Module) -> Llava:
        model: Any = unwrap(module)
        text = self.text.for_export(unwrap(model.decoder))
        rows = max(text.vocab_size, self.image_token + 1)  # transformers embeds the image token too
        return dataclasses.replace(self, text=dataclasses.replace(text, vocab_size=rows))

    def to_config(self) -> dict[str, Any]:
        vision = self.vision.to_config()
        keep_cls = vision.pop("keep_cls", None)
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": self.image_token,
            "projector_hidden_act": self.activation,
            "multimodal_projector_bias": self.bias,
            "vision_feature_layer": vision.pop("feature_layer"),
            "vision_feature_select_strategy": "default" if keep_cls is False else "full",
            "image_seq_length": self.vision.num_tokens(),
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": self.text.to_config(),
            "vision_config": vision,
        }

    def build(self) -> FusedModel:
        from torchfuse.models.fuse import fuse

        decoder: Any = self.text.build()
        encoder: Any = self.vision.build()
        adapter = MLP2LayerAdapter(
            encoder.feature_dim, self.text.embed_dim, activation=self.activation, bias=self.bias
        )
        return fuse(
            decoder, encoder, arch="joint_decoder", adapter=adapter, encoder_token=self.image_token
        )

    def key_table(self) -> KeyTable:
        kinds = ("weight", "bias") if self.bias else ("weight",)
        projector = KeyTable(
            tuple(
                Entry(f"{_PROJECTOR}{name}.{kind}", f"adapter.{name}.{kind}")
                for name in ("linear_1", "linear_2")
                for kind in kinds
            )
        )
        tower = (
            self.vision.key_table().with_aliases(("vision_model.", "")).with_prefix(_TOWER, "encoder.")
        )
        text = self.text.key_table().with_prefix(_DECODER, "decoder.")
        return (text + tower + projector).with_aliases(
            # Names of the modules since transformers 4.52.
            ("model.language_model.", _DECODER + "model."),
            ("model.vision_tower.", _TOWER),
            ("model.multi_modal_projector.", _PROJECTOR),
            ("lm_head.", _DECODER + "lm_head."),
        )

    def padded_rows(self) -> dict[str, int]:
        return {f"decoder.{name}": rows for name, rows in self.text.padded_rows().items()}
