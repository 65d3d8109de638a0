"""Any tower of transformers, under its own names.

A directory may hold the tower alone, or a whole model with the tower in it, whose keys then have a
common prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from torchfuse.checkpoint.formats.key_table import Entry, KeyTable
from torchfuse.checkpoint.formats.registry import register_format
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.checkpoint.formats.spec import Spec
from torchfuse.errors import CheckpointError

__all__ = ["HfTower"]

# Prefixes of settings that do not change the tower's features: initialisation, training, labels.
_WITHOUT_EFFECT: Final = tuple(
    "initializer dropout layerdrop drop_path mask_ output_ return_dict id2label label2id architectures "
    "dtype torch_dtype transformers_version _ projection_dim problem_type use_cache tie_ is_ chunk_size "
    "num_labels".split()
)


@register_format("encoder")
@dataclass(frozen=True)
class HfTower(Spec):
    """A tower of transformers: torchfuse's ``HfEncoder``.

    Attributes:
        config: transformers' own configuration of the tower.
        names: keys in a file by keys of the module; empty if read from a configuration.
    """

    name = "hf"
    model_types = frozenset()

    config: Mapping[str, Any] = field(compare=False)
    feature_layer: int | None = field(compare=False)
    keep_cls: bool | None = field(compare=False)
    names: Mapping[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def matches_config(cls, config: Mapping[str, Any]) -> bool:
        return isinstance(config.get("model_type"), str)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HfTower:
        from torchfuse.encoders.hf_build import tower_config  # imports transformers

        given = Settings(config, cls.name)
        layer = config.get("feature_layer")
        layer = None if layer is None else given.count("feature_layer", least=-(2**20))
        keep_cls = None if config.get("keep_cls") is None else given.flag("keep_cls")
        given.raise_problems()
        own = {k: v for k, v in config.items() if k not in ("feature_layer", "keep_cls")}
        return cls(tower_config(own).to_dict(), layer, keep_cls)

    @classmethod
    def matches_module(cls, module: nn.Module) -> bool:
        from torchfuse.encoders.hf import HfEncoder

        return isinstance(module, HfEncoder)

    @classmethod
    def from_module(cls, module: nn.Module) -> HfTower:
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

    def total_layers(self) -> int:
        layers = self.config.get("num_hidden_layers") or 0
        return layers if isinstance(layers, int) else 0

    def with_features(self, feature_layer: int, keep_cls: bool) -> HfTower:
        from torchfuse.encoders.hf_towers import special_tokens

        kind = str(self.config["model_type"])
        has_some = bool(special_tokens(kind))
        if not has_some and not keep_cls:
            raise CheckpointError(f"The tower's class token cannot be dropped: a {kind} has none.")
        return dataclasses.replace(
            self, feature_layer=feature_layer, keep_cls=keep_cls if has_some else None
        )

    def num_tokens(self) -> int:
        import torch

        with torch.device("meta"):
            encoder: Any = self.build()
        return int(encoder.num_tokens or 0)

    def key_table(self) -> KeyTable:
        # Where features do not pass through the pooler it is not built.
        pooler = any(name.startswith("pooler.") for name in self.names)
        entries = tuple(Entry(source, target) for target, source in self.names.items())
        ignored = () if pooler else (r"pooler\..+",)
        return KeyTable(entries, ignored=(r"embeddings\.position_ids", *ignored))

    def key_prefix(self, keys: Collection[str]) -> str:
        keys, names = set(keys), list(self.names.values())
        prefixes = {k.removesuffix(names[0]) for k in keys if ("." + k).endswith("." + names[0])}
        fitting = [p for p in prefixes if all(p + name in keys for name in names)]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{len(fitting)} towers in this checkpoint fit, below {', '.join(sorted(fitting))}; "
                "give a directory with one."
            )
        # If none fits, the one with most of the names makes the most useful error.
        candidates = fitting or sorted(prefixes) or [""]
        return max(candidates, key=lambda p: sum(p + name in keys for name in names))

    def differences(self, model: Spec) -> list[str]:
        if not isinstance(model, HfTower):
            return super().differences(model)
        return [
            f"{key} {self.config.get(key)!r}, the model has {value!r}"
            for key, value in model.config.items()
            if not key.startswith(_WITHOUT_EFFECT)
            and not key.endswith(("_dropout", "_token_id"))
            and self.config.get(key) != value
        ]
