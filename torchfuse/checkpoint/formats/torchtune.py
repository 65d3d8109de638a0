"""State dicts of torchtune 0.6.1's own ``DeepFusionModel`` and ``EarlyFusionModel``.

Keys are those of torchfuse. Values differ only where the tower is that of Llama 3.2 Vision: torchtune
has embeddings of tiles as a grid, torchfuse as one row per aspect ratio.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from torchfuse.checkpoint.formats.fused import Fused
from torchfuse.checkpoint.formats.key_table import SAME_NAMES, Entry, KeyTable, Layout
from torchfuse.checkpoint.formats.mllama_vision import TILE_EMBEDDINGS, MllamaVision
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.spec import UNNAMED_KEY, ModelSpec, Spec
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint
from torchfuse.models.base import FusedModel
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import unwrap

__all__ = ["Torchtune", "grid_layout"]


@register_format("model")
@dataclass(frozen=True)
class Torchtune(ModelSpec):
    """A fused model that torchtune could have built.

    Attributes:
        model: the settings of the model; None where no configuration can describe it.
        towers: the towers of Llama 3.2 Vision, by the prefix of their keys.
    """

    name = "torchtune"
    model_types = frozenset({"torchtune"})
    may_be_sharded = False

    model: Fused | None
    towers: Mapping[str, MllamaVision] = field(compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Torchtune:
        inner = config.get("model")
        if inner is None:  # enough for load_pretrained, which has the model
            return cls(None, {})
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"torchtune: config.json: model must be a section, got {inner!r:.80}.")
        model = Fused.from_config(inner)
        return cls(model, _towers_of_tiles(model.encoders))

    @classmethod
    def from_module(cls, module: nn.Module) -> Torchtune:
        model = cls.fused_model(module)
        arch, named = model.strategy.arch, not hasattr(model, "encoder")
        problems = []
        if arch not in ("cross_attention", "joint_decoder"):
            problems.append(f"its architecture {arch!r}: torchtune does not have it")
        if arch == "cross_attention" and named:
            problems.append("its named encoders: torchtune's DeepFusionModel has one without a name")
        if arch == "joint_decoder" and not named:
            problems.append("its encoder without a name: torchtune's EarlyFusionModel has named ones")
        if arch == "joint_decoder" and model.strategy.options()["placement"] != "placeholder":
            problems.append("its placement: torchtune's EarlyFusionModel has placeholders")
        problems += [
            f"the adapter of {name!r}: torchtune has no adapters"
            for name in model.encoder_names
            if model.get_adapter(name) is not None
        ]
        if isinstance(unwrap(model.decoder).output, FusionLinear | TiedFusionLinear):
            problems.append("the head's new rows: no head of torchtune scores new tokens")
        if problems:
            raise cls.cannot_hold(problems)
        encoders = {name: unwrap(model.get_encoder(name)) for name in model.encoder_names}
        towers = _towers_of_tiles(
            {
                name if named else UNNAMED_KEY: MllamaVision.from_module(encoder)
                for name, encoder in encoders.items()
                if MllamaVision.matches_module(encoder)
            }
        )
        try:
            settings: Any = replace(Fused.from_module(model), lora=[])  # LoRA is merged
        except ValueError:  # parts that no configuration can describe
            settings = None
        return cls(settings, towers)

    @classmethod
    def from_keys(cls, checkpoint: Checkpoint, model: nn.Module | None) -> Torchtune | None:
        described = checkpoint.config.get("model_type") in (Fused.name, cls.name)
        if described or not _has_torchtune_keys(checkpoint):
            return None
        if model is None:
            raise CheckpointError(
                "the keys are torchtune's, and there is no configuration of the model: build it, and "
                "give it to load_pretrained with this checkpoint."
            )
        return cls.from_module(model)

    def to_config(self) -> dict[str, Any]:
        known = {} if self.model is None else {"model": self.model.to_config()}
        return {"model_type": "torchtune", **known}

    def build(self) -> FusedModel:
        if self.model is None:
            raise CheckpointError(
                "torchtune: config.json does not describe the model: build it, and give it to "
                "load_pretrained with this checkpoint."
            )
        return self.model.build()

    def key_table(self) -> KeyTable:
        grids = tuple(
            Entry(prefix + name, prefix + name, grid_layout(spec))
            for prefix, spec in self.towers.items()
            for name in TILE_EMBEDDINGS
        )
        return KeyTable(grids) + SAME_NAMES

    def differences(self, model: Spec) -> list[str]:
        if isinstance(model, Torchtune) and (self.model is None or model.model is None):
            return []  # only keys and shapes can be compared
        return super().differences(model)


def grid_layout(spec: MllamaVision) -> Layout:
    """Return the layout of tile embeddings: grids ``[t, t, n, d]`` in torchtune's and Meta's files."""
    from torchfuse.encoders.mllama_tiles import grid_to_table, table_to_grid

    def to_source(table: Tensor) -> Tensor:
        try:
            return table_to_grid(table, spec.supported_aspect_ratios)
        except ValueError as error:
            raise CheckpointError(
                f"{error} The format torchfuse can hold it, and mllama where it can hold the rest."
            ) from error

    return Layout(
        lambda grid: grid_to_table(grid, spec.supported_aspect_ratios, spec.max_num_tiles),
        to_source,
        always_representable=False,
    )


def _towers_of_tiles(encoders: Mapping[str, Spec]) -> dict[str, MllamaVision]:
    return {
        "encoder." if name == UNNAMED_KEY else f"encoders.{name}.": spec
        for name, spec in encoders.items()
        if isinstance(spec, MllamaVision)
    }


def _has_torchtune_keys(keys: Collection[str]) -> bool:
    return bool(keys) and all(key.startswith(("decoder.", "encoder.", "encoders.")) for key in keys)
