"""LLaVA as Hugging Face saves it: a Llama, a vision tower, and two linear maps between them.

Here that is a ``joint_decoder`` model with placeholders and the adapter ``mlp_2layer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.llama import Llama
from torchfuse.checkpoint.formats.parts import ENCODERS, read_spec
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec, Spec, setting
from torchfuse.errors import CheckpointError
from torchfuse.models.base import FusedModel
from torchfuse.modules.adapters.builtin import MLP2LayerAdapter
from torchfuse.naming import unwrap

__all__ = ["Llava"]

_ACTIVATIONS: Final = {name: name for name in ("gelu", "silu", "relu")}
_SELECTED: Final = {"default": False, "full": True}
_DECODER, _TOWER, _PROJECTOR = "language_model.", "vision_tower.", "multi_modal_projector."


@dataclass(frozen=True)
class Llava(ModelSpec):
    """A whole LLaVA."""

    name = "llava"
    model_types = frozenset({"llava"})

    text: Llama
    vision: Spec
    image_token: int = setting("image_token_index")
    activation: str = setting("projector_hidden_act")
    bias: bool = setting("multimodal_projector_bias")

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
        given.done()
        vision = read_spec(tower, ENCODERS).selecting(feature_layer, keep_cls)
        return cls(read_llama(text), vision, image_token, activation, bias)

    @classmethod
    def of(cls, module: nn.Module) -> Llava:
        model: Any = cls.parts_of(module, arch="joint_decoder")
        options, adapter = model.strategy.options(), model.get_adapter("encoder")
        problems = []
        if options["placement"] != "placeholder":
            problems.append(f"placement={options['placement']!r}: LLaVA has placeholders")
        if not isinstance(adapter, MLP2LayerAdapter):
            problems.append(f"the adapter, a {type(adapter).__name__}: LLaVA's is mlp_2layer")
        elif adapter.linear_1.out_features != adapter.out_dim:
            problems.append("the adapter's hidden_dim: LLaVA's is the decoder's width")
        text = cls.spec_of(model.decoder, (Llama,), "the decoder", problems)
        vision = cls.spec_of(model.encoder, ENCODERS, "the encoder", problems)
        if problems:
            raise CheckpointError(cls.cannot_hold(problems))
        assert isinstance(text, Llama)
        assert vision is not None
        token = options["encoder_token"]
        made = adapter.options()
        return cls(text, vision, token, made["activation"], made["bias"])

    def to_export(self, module: nn.Module) -> Llava:
        model: Any = unwrap(module)
        text = self.text.to_export(unwrap(model.decoder))
        rows = max(text.vocab_size, self.image_token + 1)  # transformers looks the token up, too
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
            "tie_word_embeddings": self.text.tied,
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

    def table(self) -> KeyTable:
        kinds = ("weight", "bias") if self.bias else ("weight",)
        projector = KeyTable(
            tuple(
                Entry(f"{_PROJECTOR}{name}.{kind}", f"adapter.{name}.{kind}")
                for name in ("linear_1", "linear_2")
                for kind in kinds
            )
        )
        tower = self.vision.table().spelled(("vision_model.", "")).under(_TOWER, "encoder.")
        text = self.text.table().under(_DECODER, "decoder.")
        return (text + tower + projector).spelled(
            # As the modules are called since transformers 4.52.
            ("model.language_model.", _DECODER + "model."),
            ("model.vision_tower.", _TOWER),
            ("model.multi_modal_projector.", _PROJECTOR),
            ("lm_head.", _DECODER + "lm_head."),
        )

    def rows(self) -> dict[str, int]:
        return {f"decoder.{name}": rows for name, rows in self.text.rows().items()}


def read_llama(config: Mapping[str, Any]) -> Llama:
    """The text part of a whole model's configuration, which must be a Llama."""
    spec = read_spec(config, (Llama,))
    assert isinstance(spec, Llama)
    return spec
