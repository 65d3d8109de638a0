"""torchfuse's own directories: any fused model, under the names that its parameters have.

``config.json`` says of what parts the model is made and how they are fused; parts that other libraries
know are described as those would.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import SAME_NAMES, KeyTable
from torchfuse.checkpoint.formats.parts import DECODERS, ENCODERS, read_spec
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import ModelSpec, Spec, setting, shown_by_shapes
from torchfuse.errors import CheckpointError
from torchfuse.models.base import FusedModel
from torchfuse.models.strategy import build_modality_strategy
from torchfuse.modules.adapters.builtin import Adapter, build_adapter
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import model_behind, unwrap

__all__ = ["Fused"]

_FORMAT: Final = 1
_ONE: Final = ""  # the name of an encoder without a name


@dataclass(frozen=True)
class Fused(ModelSpec):
    """A fused model of any architecture."""

    name = "torchfuse"
    model_types = frozenset({"torchfuse"})

    decoder: Spec
    encoders: Mapping[str, Spec] = field(compare=False)
    arch: str = setting("arch")
    options: Mapping[str, Any] = shown_by_shapes()  # or by _different_options
    adapters: Mapping[str, Mapping[str, Any]] = setting("adapters")
    fusion_vocab_size: int = setting("fusion_vocab_size")
    fusion_head: bool = setting("fusion_head")
    on_missing: str = field(default="skip", compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Fused:
        given = Settings(config, cls.name)
        if given.count("format") != _FORMAT:
            given.problem(f"format {config.get('format')!r} is not known here, only {_FORMAT}")
        decoder = given.section("decoder").values
        encoders = given.sections("encoders")
        adapters = given.sections("adapters")
        options = dict(given.section("options").values)
        arch = config.get("arch")
        if not isinstance(arch, str):
            given.problem(f"arch must be the name of an architecture, got {arch!r}")
        if not encoders:
            given.problem("encoders must name one at least")
        if adapters and adapters.keys() != encoders.keys():
            given.problem(
                f"adapters {sorted(adapters)} must have the names of encoders {sorted(encoders)}"
            )
        numbers = given.count("fusion_vocab_size", 0, least=0), given.flag("fusion_head", False)
        on_missing = given.choice("on_missing", {n: n for n in ("skip", "participate")}, "skip")
        given.done()
        return cls(
            read_spec(decoder, DECODERS),
            {name: read_spec(values, ENCODERS) for name, values in encoders.items()},
            str(arch),
            options,
            adapters,
            *numbers,
            on_missing,
        )

    @classmethod
    def of(cls, module: nn.Module) -> Fused:
        model = model_behind(module)
        if not isinstance(model, FusedModel):
            raise CheckpointError(cls.cannot_hold([f"a {type(model).__name__} is no fused model"]))
        decoder: Any = unwrap(model.decoder)
        problems: list[str] = []
        base = cls.spec_of(decoder, DECODERS, "the decoder", problems)
        named = not hasattr(model, "encoder")
        encoders, adapters = {}, {}
        for name in model.encoder_names:
            key = name if named else _ONE
            encoders[key] = cls.spec_of(model.get_encoder(name), ENCODERS, f"encoder {name!r}", problems)
            adapter = model.get_adapter(name)
            if isinstance(adapter, Adapter) and adapter.name is not None:
                sizes = {"in_dim": adapter.in_dim, "out_dim": adapter.out_dim}
                adapters[key] = {"name": adapter.name, **sizes, **adapter.options()}
            elif adapter is not None:
                problems.append(
                    f"the adapter of {name!r}, a {type(adapter).__name__}: only adapters that "
                    "register_adapter knows can be built again"
                )
        options: dict[str, Any] = {}
        try:
            options = model.strategy.describe(decoder)
            options = json.loads(json.dumps(options))
        except (TypeError, ValueError) as error:
            problems.append(f"the options of {model.strategy.arch!r}: {error}")
        if problems:
            raise CheckpointError(cls.cannot_hold(problems))
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
        }

    def build(self) -> FusedModel:
        from torchfuse.models.fuse import fuse

        adapters: dict[str, Any] = {}
        for name, values in self.adapters.items():
            options = dict(values)
            adapters[name] = build_adapter(
                options.pop("name"), options.pop("in_dim"), options.pop("out_dim"), **options
            )
        encoders = {name: spec.build() for name, spec in self.encoders.items()}
        single = list(encoders) == [_ONE]
        return fuse(
            self.decoder.build(),
            encoders[_ONE] if single else encoders,
            arch=self.arch,
            adapter=(adapters[_ONE] if single else adapters) if adapters else None,
            fusion_vocab_size=self.fusion_vocab_size,
            fusion_head=self.fusion_head,
            on_missing=self.on_missing,  # type: ignore[arg-type]
            **self.options,
        )

    def depth(self) -> int:
        return super().depth() + sum(spec.depth() for spec in self.encoders.values())

    def table(self) -> KeyTable:
        return SAME_NAMES

    def differences(self, ours: Spec) -> list[str]:
        problems = super().differences(ours)
        if isinstance(ours, Fused):
            if self.arch == ours.arch:
                problems += self._different_options(ours)
            for name in self.encoders.keys() & ours.encoders.keys():
                problems += self.encoders[name].differences(ours.encoders[name])
        return problems

    def _different_options(self, ours: Fused) -> list[str]:
        try:
            theirs, here = self._options_in_common(), ours._options_in_common()
        except ValueError as error:
            return [str(error)]
        return [
            f"{name} {theirs.get(name)!r}, the model has {here.get(name)!r}"
            for name in {**theirs, **here}
            if theirs.get(name) != here.get(name)
        ]

    def _options_in_common(self) -> dict[str, Any]:
        """The options that a checkpoint and a model must have in common, as a file holds them."""
        return json.loads(json.dumps(build_modality_strategy(self.arch, **self.options).options()))
