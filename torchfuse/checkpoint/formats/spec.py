"""What a checkpoint's configuration says of a module, as numbers that can be compared.

One class a format, a frozen dataclass. It is read from a ``config.json`` or from a module, and either
can be made from it: so a checkpoint and a module that it is to go into are compared setting by setting,
a module can be built from a directory alone, and a directory can be written from a module alone.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from torchfuse.checkpoint.formats.key_table import KeyTable
from torchfuse.errors import CheckpointError
from torchfuse.naming import model_behind, unwrap

__all__ = ["ModelSpec", "Spec", "setting", "shown_by_shapes"]


def setting(theirs: str) -> Any:
    """A field that no shape shows: it must agree. ``theirs`` is its name in their configuration."""
    return dataclasses.field(metadata={"theirs": theirs})


def shown_by_shapes(**options: Any) -> Any:
    """A field that need not be compared: shapes and names do, or it is the model's own choice."""
    return dataclasses.field(compare=False, **options)


@dataclasses.dataclass(frozen=True)
class Spec(ABC):
    """The settings of one format; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """What people call the format."""

    model_types: ClassVar[frozenset[str]]
    """What ``model_type`` in a ``config.json`` may be."""

    may_be_sharded: ClassVar[bool] = True
    """Whether a checkpoint may be several files."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Spec:
        """Read a configuration.

        Raises:
            CheckpointError: naming every setting that is missing, wrong or cannot be expressed.
        """

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module) -> Spec:
        """Read a module.

        Raises:
            CheckpointError: naming what of it the format cannot hold.
        """

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of this format."""
        kind = config.get("model_type")
        return isinstance(kind, str) and kind in cls.model_types

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        """Whether a module is of the kind that this format is for."""
        return False

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """The configuration, as ``config.json`` holds it."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the module, on the default device and in the default dtype."""

    def to_export(self, module: nn.Module) -> Spec:
        """The settings of a checkpoint of this module: new tokens are merged into the tables there."""
        return self

    def rows(self) -> dict[str, int]:
        """How many rows tables have there, by our name; where ours have fewer, they are filled up."""
        return {}

    @classmethod
    def cannot_hold(cls, problems: Collection[str]) -> str:
        """The message for a module that the format cannot hold."""
        return f"The format {cls.name} cannot hold this: {'; '.join(problems)}."

    @abstractmethod
    def table(self) -> KeyTable:
        """Their names and ours."""

    def depth(self) -> int:
        """How many layers there are, all parts together."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return sum(part.depth() for part in parts if isinstance(part, Spec))

    def selecting(self, feature_layer: int, keep_cls: bool) -> Spec:
        """The settings of a tower of which another model takes this hidden state.

        Raises:
            CheckpointError: if the tower has no such thing.
        """
        return dataclasses.replace(self, feature_layer=feature_layer, keep_cls=keep_cls)  # type: ignore[call-arg]

    def num_tokens(self) -> int:
        """Features of one image, where the settings fix it."""
        raise NotImplementedError

    def prefix_in(self, keys: Collection[str]) -> str:
        """What their names begin with in this checkpoint; names that do not are another part's."""
        return ""

    def differences(self, ours: Spec) -> list[str]:
        """In what a checkpoint with these settings differs from a module with those, in words."""
        if type(self) is not type(ours):
            return [f"it is a {self.name}, the model has a {ours.name}"]
        problems = []
        for field in dataclasses.fields(self):
            if not field.compare:
                continue
            theirs, here = getattr(self, field.name), getattr(ours, field.name)
            if isinstance(theirs, Spec) and isinstance(here, Spec):
                problems += theirs.differences(here)
            elif theirs != here:
                name = field.metadata.get("theirs", field.name)
                problems.append(f"{name} {_show(theirs)}, the model has {_show(here)}")
        return problems


class ModelSpec(Spec):
    """The settings of a format for whole fused models."""

    @classmethod
    def parts_of(cls, module: nn.Module, arch: str) -> nn.Module:
        """The model inside wrappers and faces, if of an architecture, with one encoder without a name.

        Raises:
            CheckpointError: if it is not.
        """
        model: Any = model_behind(module)
        strategy = getattr(model, "strategy", None)
        names = getattr(model, "encoder_names", [])
        problems = []
        if strategy is None:
            problems.append(f"a {type(model).__name__} is no fused model")
        elif strategy.arch != arch:
            problems.append(f"its architecture {strategy.arch!r}: only {arch!r} can be held")
        if strategy is not None and (len(names) != 1 or not hasattr(model, "encoder")):
            problems.append(
                f"its named encoders {', '.join(names)}: only one without a name can be held"
            )
        if problems:
            raise CheckpointError(cls.cannot_hold(problems))
        return model

    @classmethod
    def spec_of(
        cls, module: nn.Module, formats: Sequence[type[Spec]], what: str, problems: list[str]
    ) -> Spec | None:
        """The settings of a part; why it has none is noted in ``problems``."""
        inner = unwrap(module)
        try:
            for format_ in formats:
                if format_.holds(inner):
                    return format_.of(inner)
        except ValueError as error:
            problems.append(f"{what}: {error}")
        else:
            problems.append(
                f"{what}, a {type(inner).__name__}: it can hold {', '.join(f.name for f in formats)}"
            )
        return None


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
