"""Any tower of transformers, under its own names.

A directory may hold the tower alone or a whole model with the tower in it: its names are then those
that stand behind one and the same beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec, shown_by_shapes
from torchfuse.errors import CheckpointError

__all__ = ["HfTower"]

# What of a configuration says nothing about the result of the tower: initialisation, training, labels.
_OF_NO_EFFECT: Final = (
    "initializer",
    "dropout",
    "layerdrop",
    "drop_path",
    "mask_",
    "output_",
    "return_dict",
    "id2label",
    "label2id",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_",
    "projection_dim",
    "problem_type",
    "use_cache",
    "tie_",
    "is_",
    "chunk_size",
    "num_labels",
)


@dataclass(frozen=True)
class HfTower(Spec):
    """A tower of transformers: torchfuse's ``HfEncoder``.

    Attributes:
        config: transformers' own configuration of the tower.
        names: of its tensors in a file, by those in memory; none where there is a directory only.
    """

    name = "transformers tower"
    model_types = frozenset()

    config: Mapping[str, Any] = shown_by_shapes()
    feature_layer: int | None = shown_by_shapes(default=None)
    keep_cls: bool | None = shown_by_shapes(default=None)
    names: Mapping[str, str] = shown_by_shapes(default_factory=dict)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return isinstance(config.get("model_type"), str)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HfTower:
        from torchfuse.encoders.hf_build import tower_config  # imports transformers

        given = Settings(config, cls.name)
        layer = config.get("feature_layer")
        layer = None if layer is None else given.count("feature_layer", least=-(2**20))
        keep_cls = None if config.get("keep_cls") is None else given.flag("keep_cls")
        given.done()
        own = {k: v for k, v in config.items() if k not in ("feature_layer", "keep_cls")}
        return cls(tower_config(own).to_dict(), layer, keep_cls)

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        from torchfuse.encoders.hf import HfEncoder

        return isinstance(module, HfEncoder)

    @classmethod
    def of(cls, module: nn.Module) -> HfTower:
        from torchfuse.encoders.hf_build import saved_names  # imports transformers

        tower: Any = module
        names = saved_names(tower.wrapped)
        return cls(tower.config.to_dict(), tower.feature_layer, tower.keep_cls, names)

    def to_config(self) -> dict[str, Any]:
        return {**self.config, "feature_layer": self.feature_layer, "keep_cls": self.keep_cls}

    def build(self) -> nn.Module:
        from torchfuse.encoders.hf_build import hf_encoder, tower_config

        return hf_encoder(
            tower_config(self.config), feature_layer=self.feature_layer, keep_cls=self.keep_cls
        )

    def depth(self) -> int:
        layers = self.config.get("num_hidden_layers") or 0
        return layers if isinstance(layers, int) else 0

    def selecting(self, feature_layer: int, keep_cls: bool) -> HfTower:
        from torchfuse.encoders.hf import special_tokens

        kind = str(self.config["model_type"])
        has_some = bool(special_tokens(kind))
        if not has_some and not keep_cls:
            raise CheckpointError(
                f"transformers tower: the class token of a {kind} is to be dropped, but it has none."
            )
        return dataclasses.replace(
            self, feature_layer=feature_layer, keep_cls=keep_cls if has_some else None
        )

    def num_tokens(self) -> int:
        import torch

        with torch.device("meta"):
            encoder: Any = self.build()
        return int(encoder.num_tokens or 0)

    def table(self) -> KeyTable:
        # Where features do not pass the pooler it is not built, and is of no use.
        pooler = any(name.startswith("pooler.") for name in self.names)
        ignored = (
            (r"embeddings\.position_ids",) if pooler else (r"embeddings\.position_ids", r"pooler\..+")
        )
        return KeyTable(
            tuple(Entry(theirs, ours) for ours, theirs in self.names.items()), ignored=ignored
        )

    def prefix_in(self, keys: Collection[str]) -> str:
        held = set(keys)
        names = list(self.names.values())
        first = names[0]
        prefixes = {key.removesuffix(first) for key in held if ("." + key).endswith("." + first)}
        fitting = [p for p in prefixes if all(p + name in held for name in names)]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{len(fitting)} towers in this checkpoint fit, below {', '.join(sorted(fitting))}; "
                "give a directory with one."
            )
        # The one that is nearest tells best what is amiss.
        return max(
            fitting or sorted(prefixes) or [""],
            key=lambda p: sum(p + name in held for name in names),
        )

    def differences(self, ours: Spec) -> list[str]:
        if not isinstance(ours, HfTower):
            return super().differences(ours)
        return [
            f"{key} {self.config.get(key)!r}, the model has {value!r}"
            for key, value in ours.config.items()
            if not key.startswith(_OF_NO_EFFECT)
            and not key.endswith(("_dropout", "_token_id"))
            and self.config.get(key) != value
        ]
