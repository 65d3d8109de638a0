"""Configurations of a vision-language model, one for each part.

Each is a dataclass that checks the types of its values, and can be read from a mapping, as a YAML file
holds it. Ranges are checked by what is built: decoder, encoder, adapter and strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from torchfuse.encoders.registry import build_encoder, encoder_takes
from torchfuse.errors import ConfigError
from torchfuse.models.strategy import ModalityStrategy, build_modality_strategy
from torchfuse.models.types import OnMissing
from torchfuse.modules.adapters.base import Adapter, build_adapter
from torchfuse.options import call_with_options, check_fields
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage, read_freeze_meta

__all__ = ["AdapterConfig", "ModelConfig", "VLMConfig", "VisionEncoderConfig"]


class _Section:
    """A section of a configuration, whose class is a dataclass."""

    section: ClassVar[str]
    """The section's name in messages."""

    def __post_init__(self) -> None:
        check_fields(self, self.section)

    @classmethod
    def read(cls, given: Self | Mapping[str, Any]) -> Self:
        """Return a configuration, given as itself or as a mapping of its fields.

        Raises:
            ConfigError: naming every unknown and missing field and every value of a wrong type.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"{cls.section} must be a {cls.__name__} or a mapping of its fields, got {given!r}."
            )
        return call_with_options(cls, what=cls.section, options=given)


def _merged(section: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the union of two mappings; a name in both is a ``ConfigError``."""
    if twice := [str(name) for name in given if name in options]:
        raise ConfigError(
            f"{section}: {', '.join(twice)} cannot be in options, as it is given outside of them; "
            f"got options {dict(options)}."
        )
    return {**options, **given}


@dataclass(frozen=True)
class ModelConfig(_Section):
    """The decoder, a Llama: the arguments of ``torchfuse.models.decoders.llama.llama_decoder``.

    Raises:
        ConfigError: naming every value of a wrong type.
    """

    section: ClassVar[str] = "model"

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    max_seq_len: int
    intermediate_dim: int
    head_dim: int | None = None
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_base: float = 10_000.0
    rope_scale_factor: float = 1.0

    def build(self) -> nn.Module:
        """Build the decoder, with fresh weights.

        Raises:
            ConfigError: naming every number that is out of range.
        """
        from torchfuse.models.decoders.llama import llama_decoder  # imports torchtune

        return llama_decoder(**dataclasses.asdict(self))


@dataclass(frozen=True)
class VisionEncoderConfig(_Section):
    """The encoder, by its registered name.

    Args:
        type: see ``torchfuse.encoders.build_encoder``.
        path: directory of a tower, for encoders that take one.
        num_tokens: features of one image. None: the encoder's own number.
        feature_dim: width of the features. None: the encoder's own width.
        num_frames: the most frames of a clip, or images a row.
        options: the encoder's other options.

    Raises:
        ConfigError: naming every value of a wrong type.
    """

    section: ClassVar[str] = "vision_encoder"

    type: str
    path: str | None = None
    num_tokens: int | None = None
    feature_dim: int | None = None
    num_frames: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Build the encoder; a tower of transformers has no weights until ``load_pretrained``.

        Raises:
            ConfigError: for an unknown type or option, or an encoder with other numbers than these.
        """
        fields = ("path", "num_tokens", "feature_dim")
        given = {n: value for n in fields if (value := getattr(self, n)) is not None}
        options = _merged(self.section, self.options, given)
        numbers = {n: options.pop(n) for n in fields[1:] if n in given}
        taken = {n: v for n, v in numbers.items() if encoder_takes(self.type, n)}
        encoder = call_with_options(build_encoder, self.type, what=self.section, options=options | taken)
        wrong = [
            f"{n} is {number}, the encoder's {getattr(encoder, n)}"
            for n, number in numbers.items()
            if getattr(encoder, n) != number
        ]
        if wrong:
            raise ConfigError(f"vision_encoder {self.type!r}: {'; '.join(wrong)}.")
        return encoder


@dataclass(frozen=True)
class AdapterConfig(_Section):
    """The adapter, by its registered name.

    Args:
        type: see ``torchfuse.modules.adapters.build_adapter``.
        options: the adapter's own options.

    Raises:
        ConfigError: naming every value of a wrong type.
    """

    section: ClassVar[str] = "adapter"

    type: str = "mlp_2layer"
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, in_dim: int, out_dim: int, num_tokens: int | None) -> Adapter:
        """Build the adapter between these widths, for images of ``num_tokens`` features.

        Raises:
            ConfigError: for an unknown type or option, or a value that is out of range.
        """
        options = _merged(self.section, self.options, {"num_tokens": num_tokens})
        return call_with_options(
            build_adapter, self.type, in_dim, out_dim, what=self.section, options=options
        )


@dataclass(frozen=True)
class VLMConfig(_Section):
    """The architecture, and what trains when.

    Args:
        arch: the name of an architecture.
        options: its own options, the fields of its strategy. In a mapping they may also be beside
            ``arch``.
        max_text_len: tokens of the longest text. None: only the features are compared with
            ``max_seq_len``.
        every: see ``torchfuse.fuse``, as for the next two.
        fusion_vocab_size: number of new tokens.
        on_missing: what happens to the encoder in a batch without images.
        freeze: specs from the start, ``FreezeSpec`` or ``{module, frozen}``. Without any, only what
            fusion adds trains.
        freeze_schedule: stages, ``FreezeStage`` or ``{start_step, specs}``.

    Raises:
        ConfigError: for an unknown architecture, an unknown option of it, or a value that does not fit.

    Examples:
        >>> VLMConfig("mot", {"start": "zero"}).strategy.start
        'zero'
        >>> VLMConfig("moma", {"start": "zero", "qk_norm": True})
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: vlm: architecture 'moma': unknown option 'qk_norm'; it takes ...
    """

    section: ClassVar[str] = "vlm"

    arch: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_text_len: int | None = None
    every: int | None = None
    fusion_vocab_size: int = 0
    on_missing: OnMissing = "skip"
    freeze: Sequence[FreezeSpec | Mapping[str, Any]] = ()
    freeze_schedule: Sequence[FreezeStage | Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            _ = self.strategy
        except ValueError as error:
            fields = ", ".join(f.name for f in dataclasses.fields(self))
            raise ConfigError(f"vlm: {error} Fields of vlm itself are {fields}.") from error
        _ = self.schedule

    @classmethod
    def read(cls, given: Self | Mapping[str, Any]) -> Self:
        """Return a configuration; in a mapping, options of the architecture may be beside ``arch``."""
        if not isinstance(given, Mapping) or "arch" not in given:
            return super().read(given)
        fields = {f.name for f in dataclasses.fields(cls)}
        options, beside = given.get("options", {}), {n: v for n, v in given.items() if n not in fields}
        if beside and isinstance(options, Mapping):
            options = _merged(cls.section, options, beside)
            given = {n: v for n, v in given.items() if n in fields} | {"options": options}
        return super().read(given)

    @property
    def strategy(self) -> ModalityStrategy:
        """The architecture with its options."""
        return call_with_options(
            build_modality_strategy, self.arch, what=f"architecture {self.arch!r}", options=self.options
        )

    @property
    def schedule(self) -> FreezeSchedule:
        """What trains when, to be applied before every optimizer step."""
        specs = [
            spec
            if isinstance(spec, FreezeSpec)
            else call_with_options(FreezeSpec, what="vlm.freeze", options=spec)
            for spec in self.freeze
        ]
        stages = [
            stage if isinstance(stage, FreezeStage) else read_freeze_meta([stage])[0]
            for stage in self.freeze_schedule
        ]
        return FreezeSchedule([*specs, *stages])
