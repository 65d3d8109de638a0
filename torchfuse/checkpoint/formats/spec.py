"""Settings of a checkpoint or of a module, in a form in which the two can be compared.

There is one class per format, a frozen dataclass. It is read from a ``config.json`` or from a module,
and either can be made from it: a checkpoint and the module that it is loaded into are compared setting
by setting, a module is built from a directory alone, and a directory is written from a module alone.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Final, get_type_hints

from torch import nn

from torchfuse.checkpoint.formats.key_table import KeyTable
from torchfuse.checkpoint.formats.settings import Settings
from torchfuse.errors import CheckpointError
from torchfuse.io.directory import Checkpoint
from torchfuse.models.base import FusedModel
from torchfuse.naming import unwrap_model

__all__ = ["UNNAMED_KEY", "ModelSpec", "Spec", "parsed", "setting"]

UNNAMED_KEY: Final = ""
"""The key of an encoder without a name in ``config.json``, where a named one may be ``"encoder"``."""


def setting(
    config_key: str,
    default: Any = None,
    *,
    shown_by_shapes: bool = False,
    least: int = 1,
    choices: Sequence[str] = (),
) -> Any:
    """Declare a field that is one value of the configuration: int, float, bool, or str.

    Args:
        config_key: its key in the configuration.
        default: its value where the key is missing, or a function that computes it from the values of
            the fields before it. None: the key must be there.
        shown_by_shapes: whether it need not be compared, because shapes of tensors show it.
        least: the smallest value of an int.
        choices: the values of a str.
    """
    metadata = {"config_key": config_key, "default": default, "least": least, "choices": choices}
    return dataclasses.field(compare=not shown_by_shapes, metadata={**metadata, "scalar": True})


def parsed(config_key: str) -> Any:
    """Declare a field that the format reads and writes itself.

    Args:
        config_key: its key in the configuration, for messages.
    """
    return dataclasses.field(metadata={"config_key": config_key, "scalar": False})


@dataclasses.dataclass(frozen=True)
class Spec(ABC):
    """The settings of one format; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """Name of the format, as ``export`` takes it."""

    model_types: ClassVar[frozenset[str]]
    """The values of ``model_type`` in a ``config.json`` of this format."""

    can_export: ClassVar[bool] = True
    """Whether checkpoints of this format can be written, not only read."""

    may_be_sharded: ClassVar[bool] = True
    """Whether a checkpoint may be several files."""

    holds_lora: ClassVar[bool] = False
    """Whether a checkpoint keeps LoRA layers; if not, they are merged into what is written."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """Read the settings from a configuration.

        Raises:
            CheckpointError: naming every setting that is missing, wrong or not supported.
        """

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module) -> Spec:
        """Read the settings from a module.

        Raises:
            CheckpointError: naming what in it the format cannot hold.
        """

    @classmethod
    def read_settings(cls, given: Settings) -> dict[str, Any]:
        """Read the values of all fields that ``setting`` declares; problems are added to ``given``."""
        kinds, values = get_type_hints(cls), dict[str, Any]()
        for field in _scalars(cls):
            key, default = field.metadata["config_key"], field.metadata["default"]
            default = default(values) if callable(default) else default
            if kinds[field.name] is int:
                value: Any = given.count(key, default, least=field.metadata["least"])
            elif kinds[field.name] is float:
                value = given.number(key, default)
            elif kinds[field.name] is bool:
                value = given.flag(key, default)
            else:
                value = given.choice(key, {name: name for name in field.metadata["choices"]}, default)
            values[field.name] = value
        return values

    def written_settings(self) -> dict[str, Any]:
        """Return the values of all fields that ``setting`` declares, by key in the configuration."""
        return {f.metadata["config_key"]: getattr(self, f.name) for f in _scalars(type(self))}

    @classmethod
    def matches_config(cls, config: Mapping[str, Any]) -> bool:
        """Return whether a ``config.json`` is of this format."""
        kind = config.get("model_type")
        return isinstance(kind, str) and kind in cls.model_types

    @classmethod
    def matches_module(cls, module: nn.Module) -> bool:
        """Return whether a module is of the class that this format is for."""
        return False

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module, on the default device and in the default dtype."""

    @abstractmethod
    def key_table(self) -> KeyTable:
        """Return the table of checkpoint keys and module keys."""

    def for_export(self, module: nn.Module) -> Spec:
        """Return the settings of a checkpoint of this module, in whose tables new tokens are merged."""
        return self

    def padded_rows(self) -> dict[str, int]:
        """Return the number of rows of tables that a checkpoint pads, by target key."""
        return {}

    def total_layers(self) -> int:
        """Return the number of layers, all parts together."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        parts = sum(value.total_layers() for value in values if isinstance(value, Spec))
        return parts + getattr(self, "num_layers", 0)

    def with_features(self, feature_layer: int, keep_cls: bool) -> Spec:
        """Return the settings of this tower with another hidden state as its features.

        Raises:
            CheckpointError: if the tower does not have it.
        """
        return dataclasses.replace(self, feature_layer=feature_layer, keep_cls=keep_cls)  # type: ignore[call-arg]

    def num_tokens(self) -> int:
        """Return the number of features of one image, where the settings fix it."""
        raise NotImplementedError

    def key_prefix(self, keys: Collection[str]) -> str:
        """Return the prefix of this part's keys; keys without it belong to other parts."""
        return ""

    @classmethod
    def cannot_hold(cls, problems: Collection[str]) -> CheckpointError:
        """Make the error for a module that the format cannot hold."""
        return CheckpointError(f"The format {cls.name} cannot hold this: {'; '.join(problems)}.")

    def differences(self, model: Spec) -> list[str]:
        """List the settings in which a checkpoint differs from a model.

        Args:
            model: the model's settings; ``self`` are the checkpoint's.
        """
        if type(self) is not type(model):
            return [f"its format is {self.name}, the model's is {model.name}"]
        problems = []
        for field in dataclasses.fields(self):
            if not field.compare:
                continue
            saved, own = getattr(self, field.name), getattr(model, field.name)
            if isinstance(saved, Spec) and isinstance(own, Spec):
                problems += saved.differences(own)
            elif saved != own:
                key = field.metadata.get("config_key", field.name)
                problems.append(f"{key} {_show(saved)}, the model has {_show(own)}")
        return problems


class ModelSpec(Spec):
    """The settings of a format for whole fused models."""

    @classmethod
    def from_keys(cls, checkpoint: Checkpoint, model: nn.Module | None) -> ModelSpec | None:
        """Recognize a checkpoint by its keys, where its configuration does not name the format.

        Args:
            checkpoint: the checkpoint.
            model: the model that it is loaded into, if that is built already.

        Returns:
            None if the checkpoint is not recognized.

        Raises:
            CheckpointError: if the model is needed and not given; as the other readers.
        """
        return None

    @classmethod
    def fused_model(cls, module: nn.Module) -> FusedModel:
        """Return the fused model inside all wrappers.

        Raises:
            CheckpointError: if there is none.
        """
        model = unwrap_model(module)
        if not isinstance(model, FusedModel):
            raise cls.cannot_hold([f"a {type(model).__name__} is no fused model"])
        return model

    @classmethod
    def single_encoder_model(cls, module: nn.Module, arch: str) -> FusedModel:
        """Return the fused model inside all wrappers, of one architecture and with one unnamed encoder.

        Raises:
            CheckpointError: if it is not such a model.
        """
        model = cls.fused_model(module)
        problems = []
        if model.strategy.arch != arch:
            problems.append(f"its architecture {model.strategy.arch!r}: only {arch!r} can be held")
        if not hasattr(model, "encoder"):
            names = ", ".join(model.encoder_names)
            problems.append(f"its named encoders {names}: only one without a name can be held")
        if problems:
            raise cls.cannot_hold(problems)
        return model


def _scalars(spec: type[Spec]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(spec) if field.metadata.get("scalar")]


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
