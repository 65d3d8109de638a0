"""torchtune 0.6.1's own fused checkpoints: the state dicts of its ``DeepFusionModel`` and
``EarlyFusionModel``.

Names are the same there and here. One thing differs where the tower is that of Llama 3.2 Vision:
torchtune keeps embeddings of tiles as a grid, this package as a row an aspect ratio.
"""  # noqa: D205

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchfuse.checkpoint.formats.fused import Fused
from torchfuse.checkpoint.formats.key_table import SAME_NAMES, Entry, KeyTable, Layout
from torchfuse.checkpoint.formats.mllama_vision import TILE_EMBEDDINGS, MllamaVision
from torchfuse.checkpoint.formats.spec import ModelSpec, Spec
from torchfuse.errors import CheckpointError
from torchfuse.models.base import FusedModel
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.naming import model_behind, unwrap

__all__ = ["Torchtune", "grid_layout", "has_torchtune_names"]


@dataclass(frozen=True)
class Torchtune(ModelSpec):
    """A fused model that torchtune could have built.

    Attributes:
        model: the settings of the model, where they are known.
        towers: by the beginning of their names, the towers of Llama 3.2 Vision.
    """

    name = "torchtune"
    model_types = frozenset({"torchtune"})
    may_be_sharded = False

    model: Fused | None
    towers: Mapping[str, MllamaVision] = field(compare=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Torchtune:
        inner = config.get("model")
        if inner is None:  # only load_pretrained has a use for it then, which is given the model
            return cls(None, {})
        if not isinstance(inner, Mapping):
            raise CheckpointError(f"torchtune: config.json: model must be a section, got {inner!r:.80}.")
        model = Fused.from_config(inner)
        named = list(model.encoders) != [""]
        return cls(
            model,
            {
                f"encoders.{name}." if named else "encoder.": spec
                for name, spec in model.encoders.items()
                if isinstance(spec, MllamaVision)
            },
        )

    @classmethod
    def of(cls, module: nn.Module) -> Torchtune:
        model = model_behind(module)
        if not isinstance(model, FusedModel):
            raise CheckpointError(cls.cannot_hold([f"a {type(model).__name__} is no fused model"]))
        arch, named = model.strategy.arch, not hasattr(model, "encoder")
        problems = []
        if arch not in ("cross_attention", "joint_decoder"):
            problems.append(f"its architecture {arch!r}: torchtune has none like it")
        if arch == "cross_attention" and named:
            problems.append("its named encoders: torchtune's DeepFusionModel has one without a name")
        if arch == "joint_decoder" and not named:
            problems.append("its encoder without a name: torchtune's EarlyFusionModel has named ones")
        if arch == "joint_decoder" and model.strategy.options()["placement"] != "placeholder":
            problems.append("its placement: torchtune's EarlyFusionModel has placeholders")
        problems += [
            f"the adapter of {name!r}: torchtune has none beside an encoder"
            for name in model.encoder_names
            if model.get_adapter(name) is not None
        ]
        if isinstance(unwrap(model.decoder).output, FusionLinear | TiedFusionLinear):
            problems.append("the head's new rows: no head of torchtune scores new tokens")
        if problems:
            raise CheckpointError(cls.cannot_hold(problems))
        towers = {
            f"encoders.{name}." if named else "encoder.": MllamaVision.of(
                unwrap(model.get_encoder(name))
            )
            for name in model.encoder_names
            if MllamaVision.holds(unwrap(model.get_encoder(name)))
        }
        try:
            settings: Any = Fused.of(model)
        except ValueError:  # of parts whose settings nothing here can write down
            settings = None
        return cls(settings, towers)

    def to_config(self) -> dict[str, Any]:
        known = {} if self.model is None else {"model": self.model.to_config()}
        return {"model_type": "torchtune", **known}

    def build(self) -> FusedModel:
        if self.model is None:
            raise CheckpointError(
                "torchtune: config.json does not say what model this is: build it, and give it to "
                "load_pretrained with this checkpoint."
            )
        return self.model.build()

    def table(self) -> KeyTable:
        grids = tuple(
            Entry(prefix + name, prefix + name, grid_layout(spec))
            for prefix, spec in self.towers.items()
            for name in TILE_EMBEDDINGS
        )
        return KeyTable(grids) + SAME_NAMES

    def differences(self, ours: Spec) -> list[str]:
        if isinstance(ours, Torchtune) and (self.model is None or ours.model is None):
            return []  # names and shapes are all there is to compare
        return super().differences(ours)


def grid_layout(spec: MllamaVision) -> Layout:
    """Embeddings of tiles: a grid ``[t, t, n, d]`` there, a row an aspect ratio here."""
    from torchfuse.encoders.mllama_tiles import grid_to_table, table_to_grid

    def write(table: Tensor) -> Tensor:
        try:
            return table_to_grid(table, spec.aspect_ratios)
        except ValueError as error:
            raise CheckpointError(
                f"{error} The format torchfuse can hold it, and mllama where it can hold the rest."
            ) from error

    return Layout(
        lambda grid: grid_to_table(grid, spec.aspect_ratios, spec.max_num_tiles),
        write,
        holds_all=False,
    )


def has_torchtune_names(keys: Collection[str]) -> bool:
    """Whether all names are those of a fused model of torchtune's."""
    return bool(keys) and all(key.startswith(("decoder.", "encoder.", "encoders.")) for key in keys)
