"""Typed configurations of a vision-language model, one for each of its parts.

An architecture's own configuration is its strategy, a dataclass chosen by name: whoever names an
architecture gets its options and nobody else's. Every configuration may also be given as a mapping, as a
YAML file holds it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from torchfuse.encoders.registry import build_encoder, encoder_names, encoder_takes
from torchfuse.errors import ConfigError
from torchfuse.models.strategy import ModalityStrategy, build_modality_strategy
from torchfuse.models.types import OnMissing
from torchfuse.modules.adapters.base import Adapter, adapter_names, build_adapter
from torchfuse.options import call_with_options, check_fields
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage, read_freeze_meta

__all__ = [
    "AdapterConfig",
    "ModelConfig",
    "VLMConfig",
    "VisionEncoderConfig",
    "read_config",
]

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder, a Llama; see ``torchfuse.models.decoders.llama.llama_decoder`` for the numbers.

    Raises:
        ConfigError: naming every number that is out of range, and every value that is none.
    """

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

    def __post_init__(self) -> None:
        check_fields(self, "model")
        sizes = dataclasses.asdict(self)
        problems = [
            f"{name}={size} must be {'at least 1' if type(size) is int else 'finite and more than 0'}"
            for name, size in sizes.items()
            if not (size is None or isinstance(size, bool) or 0 < size < float("inf"))
        ]
        divides = [("num_kv_heads", "num_heads")]
        if self.head_dim is None:
            divides.append(("num_heads", "embed_dim"))
        problems += [
            f"{one}={sizes[one]} must divide {other}={sizes[other]}"
            for one, other in divides
            if not problems and sizes[other] % sizes[one]
        ]
        if not problems and (width := self.head_dim or self.embed_dim // self.num_heads) % 2:
            problems = [f"head_dim={width} must be even, as the rotary embedding turns pairs"]
        if problems:
            raise ConfigError(f"model: {'; '.join(problems)}.")

    def build(self) -> nn.Module:
        """The decoder, with fresh weights."""
        from torchfuse.models.decoders.llama import llama_decoder  # imports torchtune

        return llama_decoder(**dataclasses.asdict(self))


@dataclass(frozen=True)
class VisionEncoderConfig:
    """The encoder, by its name in the registry.

    Args:
        type: see ``torchfuse.encoders.registry.build_encoder``.
        path: directory of a tower, for encoders that take one.
        num_tokens: features of one image. None: as the encoder says.
        feature_dim: width of the features. None: as the encoder says.
        num_frames: frames of a clip at most, or images a row.
        options: what else the encoder takes.

    Raises:
        ConfigError: for an unknown type, naming those there are, or a value that does not fit.
    """

    type: str
    path: str | None = None
    num_tokens: int | None = None
    feature_dim: int | None = None
    num_frames: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "vision_encoder")
        problems = []
        if self.type not in encoder_names():
            problems.append(f"type must be one of {', '.join(encoder_names())}, got {self.type!r}")
        for name in ("num_tokens", "feature_dim", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        problems += _misplaced(self.options, [*self._given(), *_own(build_encoder)])
        if problems:
            raise ConfigError(f"vision_encoder: {'; '.join(problems)}.")

    def _given(self) -> dict[str, Any]:
        given = {"path": self.path, "num_tokens": self.num_tokens, "feature_dim": self.feature_dim}
        return {name: value for name, value in given.items() if value is not None}

    def build(self) -> nn.Module:
        """The encoder; a tower of transformers is empty until ``torchfuse.load_pretrained`` fills it.

        Raises:
            ConfigError: for options that it does not take, or if it says other numbers of itself.
        """
        own = {n: v for n, v in self._given().items() if n == "path" or encoder_takes(self.type, n)}
        encoder = build_encoder(self.type, **own, **self.options)
        wrong = [
            f"{name} is {value}, the encoder's {getattr(encoder, name)}"
            for name, value in self._given().items()
            if name != "path" and getattr(encoder, name) != value
        ]
        if wrong:
            raise ConfigError(f"vision_encoder {self.type!r}: {'; '.join(wrong)}.")
        return encoder


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter, by its name in the registry.

    Args:
        type: see ``torchfuse.modules.adapters.build_adapter``.
        options: what else the adapter takes.

    Raises:
        ConfigError: for an unknown type, naming those there are, or options that encoder and decoder
            say.
    """

    type: str = "mlp_2layer"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "adapter")
        problems = _misplaced(self.options, _own(build_adapter))
        if self.type not in adapter_names():
            problems.append(f"type must be one of {', '.join(adapter_names())}, got {self.type!r}")
        if problems:
            raise ConfigError(f"adapter: {'; '.join(problems)}.")

    def build(self, in_dim: int, out_dim: int, num_tokens: int | None) -> Adapter:
        """The adapter between such widths, for images of ``num_tokens`` features."""
        return build_adapter(self.type, in_dim, out_dim, num_tokens=num_tokens, **self.options)


@dataclass(frozen=True)
class VLMConfig:
    """How features reach the decoder, and what trains when.

    Args:
        arch: the name of an architecture.
        options: its own options, the fields of its strategy. As a mapping, a configuration may also
            have them beside ``arch``.
        max_text_len: the longest text. None: only the features are compared with ``max_seq_len``.
        every: see ``torchfuse.fuse``, as for the next two.
        fusion_vocab_size: number of new tokens.
        on_missing: what happens to the encoder in a batch without images.
        freeze: specs in force from the start, ``FreezeSpec`` or ``{module, frozen}``. Without any, only
            what fusion adds trains.
        freeze_schedule: stages, ``FreezeStage`` or ``{start_step, specs}``.

    Raises:
        ConfigError: for an unknown architecture or option, or a value that does not fit, naming the key,
            the value and what there is.

    Examples:
        >>> VLMConfig("mot", {"start": "zero"}).strategy
        MoTStrategy(placement='prefix', encoder_token=None, layers=None, start='zero')
        >>> VLMConfig("moma", {"start": "zero", "qk_norm": True})
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: vlm: architecture 'moma': unknown option 'qk_norm'; it takes ...
    """

    arch: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_text_len: int | None = None
    every: int | None = None
    fusion_vocab_size: int = 0
    on_missing: OnMissing = "skip"
    freeze: Sequence[Any] = ()
    freeze_schedule: Sequence[Any] = ()

    def __post_init__(self) -> None:
        check_fields(self, "vlm")
        least = {"max_text_len": 1, "every": 1, "fusion_vocab_size": 0}
        problems = [
            f"{name} must be at least {number}, got {value}"
            for name, number in least.items()
            if (value := getattr(self, name)) is not None and value < number
        ]
        problems += _misplaced(self.options, _own(build_modality_strategy))
        if problems:
            raise ConfigError(f"vlm: {'; '.join(problems)}.")
        try:
            _ = self.strategy
        except ValueError as error:
            raise ConfigError(f"vlm: {error} Got {dict(self.options)}.") from error
        _ = self.schedule  # names what does not fit

    @property
    def strategy(self) -> ModalityStrategy:
        """The architecture with its options."""
        return build_modality_strategy(self.arch, **{str(name): v for name, v in self.options.items()})

    @property
    def schedule(self) -> FreezeSchedule:
        """What trains when, to be applied before every optimizer step."""
        specs = [_spec(spec) for spec in self.freeze]
        stages = [
            stage if isinstance(stage, FreezeStage) else read_freeze_meta([stage])[0]
            for stage in self.freeze_schedule
        ]
        return FreezeSchedule([*specs, *stages])


def _own(build: Callable[..., Any]) -> list[str]:
    """What a builder must be told by whoever calls it, beside the options of what it builds."""
    return [p.name for p in inspect.signature(build).parameters.values() if p.kind is not p.VAR_KEYWORD]


def _misplaced(options: Mapping[str, Any], elsewhere: Sequence[str]) -> list[str]:
    names = [name for name in options if name in elsewhere]
    return [f"{', '.join(names)} must not stand in options, being said elsewhere"] if names else []


def _spec(given: Any) -> FreezeSpec:
    if isinstance(given, FreezeSpec):
        return given
    return _from_mapping(FreezeSpec, given, "vlm.freeze")


def read_config(kind: type[_Config], given: _Config | Mapping[str, Any], what: str) -> _Config:
    """A configuration, from itself or from a mapping of its fields.

    Args:
        kind: the configuration's class.
        given: one of it, or a mapping.
        what: the name of the section, for messages.

    Raises:
        ConfigError: naming every key that there is not and every value that does not fit.
    """
    if isinstance(given, kind):
        return given
    if kind is not VLMConfig or not isinstance(given, Mapping) or "arch" not in given:
        return _from_mapping(kind, given, what)
    own = [f.name for f in dataclasses.fields(VLMConfig)]
    beside = {name: value for name, value in given.items() if name not in own}
    config = {name: value for name, value in given.items() if name in own}
    options = config.get("options", {})
    if beside and isinstance(options, Mapping):  # anything else is refused below
        if problems := _misplaced(options, list(beside)):
            raise ConfigError(f"{what}: {problems[0]}; got {given}.")
        config["options"] = {**options, **beside}
    try:
        return _from_mapping(kind, config, what)
    except ValueError as error:
        raise ConfigError(f"{error} Beside them a {what} has {', '.join(own)}.") from error


def _from_mapping(kind: type[_Config], given: Any, what: str) -> _Config:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be a {kind.__name__} or a mapping of its fields, got {given!r}.")
    return call_with_options(kind, what=what, options=given)
