"""Typed configurations of a vision-language model, one for each of its parts.

An architecture's own configuration is its strategy, a dataclass chosen by name: whoever names an
architecture gets its options and nobody else's. Every configuration may also be given as a mapping, as a
YAML file holds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from torchfuse.encoders.registry import build_encoder, encoder_names, encoder_takes
from torchfuse.models.encoding import OnMissing
from torchfuse.models.lengths import check_lengths
from torchfuse.models.strategies import ModalityStrategy, build_modality_strategy
from torchfuse.modules.adapters import Adapter, build_adapter
from torchfuse.options import call_with_options
from torchfuse.params import FreezeSchedule, FreezeSpec, FreezeStage, read_freeze_meta

__all__ = [
    "AdapterConfig",
    "ModelConfig",
    "VLMConfig",
    "VisionEncoderConfig",
    "check_vlm_lengths",
    "read_config",
]

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class ModelConfig:
    """The decoder, a Llama; see ``torchfuse.models.llama.llama_decoder`` for the numbers.

    Raises:
        ValueError: naming every number that is out of range.
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
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        faults = [
            f"{name}={size} must be at least 1"
            for name, size in sizes.items()
            if type(size) is int and size < 1
        ]
        divides = [("num_kv_heads", "num_heads")]
        if self.head_dim is None:
            divides.append(("num_heads", "embed_dim"))
        faults += [
            f"{one}={sizes[one]} must divide {other}={sizes[other]}"
            for one, other in divides
            if not faults and sizes[other] % sizes[one]
        ]
        if faults:
            raise ValueError(f"model: {'; '.join(faults)}.")

    def build(self) -> nn.Module:
        """The decoder, with fresh weights."""
        from torchfuse.models.llama import llama_decoder  # imports torchtune

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
        ValueError: for an unknown type, naming those there are, or a number out of range.
    """

    type: str
    path: str | None = None
    num_tokens: int | None = None
    feature_dim: int | None = None
    num_frames: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = []
        if self.type not in encoder_names():
            faults.append(f"type must be one of {', '.join(encoder_names())}, got {self.type!r}")
        for name in ("num_tokens", "feature_dim", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1, got {value}")
        if twice := [name for name in self._given() if name in self.options]:
            faults.append(f"{', '.join(twice)} must not stand in options, too")
        if faults:
            raise ValueError(f"vision_encoder: {'; '.join(faults)}.")

    def _given(self) -> dict[str, Any]:
        given = {"path": self.path, "num_tokens": self.num_tokens, "feature_dim": self.feature_dim}
        return {name: value for name, value in given.items() if value is not None}

    def build(self) -> nn.Module:
        """The encoder; a tower of transformers is empty until ``torchfuse.load_pretrained`` fills it.

        Raises:
            ValueError: for options that it does not take, or if it says other numbers of itself.
        """
        own = {n: v for n, v in self._given().items() if n == "path" or encoder_takes(self.type, n)}
        encoder = build_encoder(self.type, **own, **self.options)
        wrong = [
            f"{name} is {value}, the encoder's {getattr(encoder, name)}"
            for name, value in self._given().items()
            if name != "path" and getattr(encoder, name) != value
        ]
        if wrong:
            raise ValueError(f"vision_encoder {self.type!r}: {'; '.join(wrong)}.")
        return encoder


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter, by its name in the registry.

    Args:
        type: see ``torchfuse.modules.adapters.build_adapter``.
        options: what else the adapter takes.
    """

    type: str = "mlp_2layer"
    options: Mapping[str, Any] = field(default_factory=dict)

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
        ValueError: for an unknown architecture or option, or a value that does not fit, naming the key,
            the value and what there is.

    Examples:
        >>> VLMConfig("mot", {"start": "zero"}).strategy
        MoTStrategy(placement='prefix', encoder_token=None, layers=None, start='zero')
        >>> VLMConfig("moma", {"start": "zero", "qk_norm": True})
        Traceback (most recent call last):
        ValueError: vlm: architecture 'moma': unknown option 'qk_norm'; it takes num_experts, ...
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
        if self.max_text_len is not None and self.max_text_len < 1:
            raise ValueError(f"vlm: max_text_len must be at least 1, got {self.max_text_len}.")
        try:
            build_modality_strategy(self.arch, **self.options)
        except ValueError as error:
            raise ValueError(f"vlm: {error} Got {dict(self.options)}.") from error
        _ = self.schedule  # names what does not fit

    @property
    def strategy(self) -> ModalityStrategy:
        """The architecture with its options."""
        return build_modality_strategy(self.arch, **self.options)

    @property
    def schedule(self) -> FreezeSchedule:
        """What trains when, to be applied before every optimizer step."""
        specs = [_spec(spec) for spec in self.freeze]
        stages = [
            stage if isinstance(stage, FreezeStage) else read_freeze_meta([stage])[0]
            for stage in self.freeze_schedule
        ]
        return FreezeSchedule([*specs, *stages])


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
        ValueError: naming every key that there is not and every value that does not fit.
    """
    if isinstance(given, kind):
        return given
    if kind is not VLMConfig or not isinstance(given, Mapping) or "arch" not in given:
        return _from_mapping(kind, given, what)
    own = [f.name for f in dataclasses.fields(VLMConfig)]
    beside = {name: value for name, value in given.items() if name not in own}
    config = {name: value for name, value in given.items() if name in own}
    if beside:
        config["options"] = {**given.get("options", {}), **beside}
    try:
        return _from_mapping(kind, config, what)
    except ValueError as error:
        raise ValueError(f"{error} Beside them a {what} has {', '.join(own)}.") from error


def _from_mapping(kind: type[_Config], given: Any, what: str) -> _Config:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a {kind.__name__} or a mapping of its fields, got {given!r}.")
    return call_with_options(kind, what=what, options=given)


def check_vlm_lengths(
    model: ModelConfig,
    vision: VisionEncoderConfig,
    adapter: AdapterConfig,
    vlm: VLMConfig,
    encoder: nn.Module | None = None,
) -> int | None:
    """Compare the longest sequence with what the decoder can hold, see ``check_lengths``.

    Args:
        model: the decoder.
        vision: the encoder.
        adapter: the adapter.
        vlm: the architecture.
        encoder: the encoder that was built. None: what its configuration says of it is taken, and where
            that is nothing, features are not counted.

    Returns:
        The length of the longest sequence; None if the encoder's number of features is not known.

    Raises:
        ValueError: if the decoder is too short, with every number.
    """
    source: Any = vision if encoder is None else encoder
    strategy = vlm.strategy
    built = None
    if source.num_tokens is not None and source.feature_dim is not None:
        with torch.device("meta"):
            built = adapter.build(source.feature_dim, model.embed_dim, source.num_tokens)
    return check_lengths(
        max_seq_len=model.max_seq_len,
        text_len=vlm.max_text_len or 0,
        num_tokens=None if built is None else source.num_tokens,
        num_frames=vision.num_frames,
        adapter=built,
        in_sequence=bool(strategy.special_tokens() or strategy.extra_tokens(1)),
    )
