"""torchfuse's own directories: any fused model, under the names of its parameters.

``config.json`` describes the parts and how they are fused; each part is described as in its own format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import SAME_NAMES, KeyTable
from torchfuse.checkpoint.formats.registry import formats_of, read_part, read_spec, register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import UNNAMED_KEY, ModelSpec, Spec
from torchfuse.lora.add import add_described_lora, describe_lora, lora_in_words
from torchfuse.models.base import FusedModel
from torchfuse.models.strategy import build_modality_strategy
from torchfuse.modules.adapters import Adapter, build_adapter
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import unwrap

__all__ = ["Fused"]

_FORMAT: Final = 1


@register_format("model")
@dataclass(frozen=True)
class Fused(ModelSpec):
    """A fused model of any architecture."""

    name = "torchfuse"
    model_types = frozenset({"torchfuse"})
    holds_lora = True

    decoder: Spec
    encoders: Mapping[str, Spec] = field(compare=False)
    arch: str
    options: Mapping[str, Any] = field(compare=False)  # or compared by _option_differences
    adapters: Mapping[str, Mapping[str, Any]]
    fusion_vocab_size: int
    fusion_head: bool
    on_missing: str = field(default="skip", compare=False)
    lora: Sequence[Mapping[str, Any]] = field(default=(), compare=False)  # compared in words

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Fused:
        given = Settings(config, cls.name)
        if given.count("format") != _FORMAT:
            given.problems.append(f"format {config.get('format')!r} is not supported, only {_FORMAT}")
        decoder = given.section("decoder").values
        encoders = given.sections("encoders")
        adapters = given.sections("adapters")
        options = dict(given.section("options").values)
        arch = config.get("arch")
        if not isinstance(arch, str):
            given.problems.append(f"arch must be the name of an architecture, got {arch!r}")
        if not encoders:
            given.problems.append("encoders must have at least one entry")
        if adapters and adapters.keys() != encoders.keys():
            given.problems.append(
                f"adapters {sorted(adapters)} must have the same names as encoders {sorted(encoders)}"
            )
        numbers = given.count("fusion_vocab_size", 0, least=0), given.flag("fusion_head", False)
        on_missing = given.choice("on_missing", {n: n for n in ("skip", "participate")}, "skip")
        lora = config.get("lora", [])
        if not isinstance(lora, list) or not all(isinstance(layers, dict) for layers in lora):
            given.problems.append(f"lora must be a list of sections, got {lora!r:.80}")
        given.raise_problems()
        return cls(
            read_spec(decoder, formats_of("decoder")),
            {name: read_spec(values, formats_of("encoder")) for name, values in encoders.items()},
            str(arch),
            options,
            adapters,
            *numbers,
            on_missing,
            lora,
        )

    @classmethod
    def from_module(cls, module: nn.Module) -> Fused:
        model = cls.fused_model(module)
        decoder: Any = unwrap(model.decoder)
        problems: list[str] = []
        base = read_part(decoder, formats_of("decoder"), "the decoder", problems)
        named = not hasattr(model, "encoder")
        encoders, adapters = {}, {}
        for name in model.encoder_names:
            key, encoder = name if named else UNNAMED_KEY, model.get_encoder(name)
            encoders[key] = read_part(encoder, formats_of("encoder"), f"encoder {name!r}", problems)
            adapter = model.get_adapter(name)
            if isinstance(adapter, Adapter) and adapter.name is not None:
                sizes = {"in_dim": adapter.in_dim, "out_dim": adapter.out_dim}
                adapters[key] = {"name": adapter.name, **sizes, **adapter.options()}
            elif adapter is not None:
                problems.append(
                    f"the adapter of {name!r}, a {type(adapter).__name__}: only registered adapters "
                    "(register_adapter) can be built again"
                )
        options: dict[str, Any] = {}
        try:
            options = model.strategy.describe(decoder)
            options = json.loads(json.dumps(options))
        except (TypeError, ValueError) as error:
            problems.append(f"the options of {model.strategy.arch!r}: {error}")
        if problems:
            raise cls.cannot_hold(problems)
        assert base is not None
        embedding = decoder.tok_embeddings
        return cls(
            base,
            {name: spec for name, spec in encoders.items() if spec is not None},
            model.strategy.arch,
            options,
            adapters,
            embedding.fusion_vocab_size if isinstance(embedding, FusionEmbedding) else 0,
            isinstance(decoder.output, FusionLinear | TiedFusionLinear),
            model.on_missing,
            describe_lora(model),
        )

    def to_config(self) -> dict[str, Any]:
        return {
            "architectures": ["FusedModel"],
            "model_type": "torchfuse",
            "format": _FORMAT,
            "arch": self.arch,
            "options": dict(self.options),
            "decoder": self.decoder.to_config(),
            "encoders": {name: spec.to_config() for name, spec in self.encoders.items()},
            "adapters": {name: dict(values) for name, values in self.adapters.items()},
            "fusion_vocab_size": self.fusion_vocab_size,
            "fusion_head": self.fusion_head,
            "on_missing": self.on_missing,
            **({"lora": list(self.lora)} if self.lora else {}),
        }

    def build(self) -> FusedModel:
        from torchfuse.models.fuse import fuse

        adapters = {name: build_adapter(**values) for name, values in self.adapters.items()}
        encoders = {name: spec.build() for name, spec in self.encoders.items()}
        unnamed = list(encoders) == [UNNAMED_KEY]
        model = fuse(
            self.decoder.build(),
            encoders[UNNAMED_KEY] if unnamed else encoders,
            arch=self.arch,
            adapter=(adapters[UNNAMED_KEY] if unnamed else adapters) if adapters else None,
            fusion_vocab_size=self.fusion_vocab_size,
            fusion_head=self.fusion_head,
            on_missing=self.on_missing,  # type: ignore[arg-type]
            **self.options,
        )
        add_described_lora(model, self.lora)
        return model

    def total_layers(self) -> int:
        return super().total_layers() + sum(spec.total_layers() for spec in self.encoders.values())

    def key_table(self) -> KeyTable:
        return SAME_NAMES

    def differences(self, model: Spec) -> list[str]:
        problems = super().differences(model)
        if isinstance(model, Fused):
            if self.arch == model.arch:
                problems += self._option_differences(model)
            for name in self.encoders.keys() & model.encoders.keys():
                problems += self.encoders[name].differences(model.encoders[name])
            if list(self.lora) != list(model.lora):
                problems.append(
                    f"LoRA {lora_in_words(self.lora)}, the model has {lora_in_words(model.lora)}"
                )
        return problems

    def _option_differences(self, model: Fused) -> list[str]:
        try:
            saved, own = self._compared_options(), model._compared_options()
        except ValueError as error:
            return [str(error)]
        return [
            f"{name} {saved.get(name)!r}, the model has {own.get(name)!r}"
            for name in {**saved, **own}
            if saved.get(name) != own.get(name)
        ]

    def _compared_options(self) -> dict[str, Any]:
        """Return the options in which checkpoint and model must agree, as JSON holds them."""
        return json.loads(json.dumps(build_modality_strategy(self.arch, **self.options).options()))
