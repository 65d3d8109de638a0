"""The interface of architectures: one strategy each.

A strategy turns tokens and encoder features into the input of the decoder, a ``ModalityContext``. It has
options but no parameters and no state, and is no submodule, so sharding, checkpoints and freezing do not
involve it. A new architecture is one class decorated with ``register_modality_strategy``; fusing,
saving, counting and generating are inherited.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeVar, get_type_hints

from torch import Tensor, nn

from torchfuse.errors import ConfigError
from torchfuse.models.types import EncoderFeatures, ModalityContext, StrategyModel
from torchfuse.naming import unwrap
from torchfuse.options import call_with_options

__all__ = [
    "ImageFormat",
    "ModalityStrategy",
    "build_modality_strategy",
    "check_rows",
    "features_per_image",
    "join_formats",
    "register_modality_strategy",
]


@dataclass(frozen=True)
class ImageFormat:
    """How images are represented in the sequences of a model.

    Attributes:
        layout: the tokens of an image: ``"marker"``: one; ``"placeholder"``: one for each feature;
            ``"prefix"``: none.
        image_token: their id. None for ``"prefix"``, and where the model does not determine it. By name
            for named encoders with placeholders of their own.
        features_per_image: features of an image, or of each of its tiles; None: unknown. By name for
            named encoders, with None for each of which it is unknown.
        scope: which images a token may attend to, see ``torchfuse.data.image_mask``.
    """

    layout: Literal["marker", "placeholder", "prefix"]
    image_token: int | Mapping[str, int] | None
    features_per_image: int | Mapping[str, int | None] | None
    scope: Literal["all", "group", "last"] = "all"


def join_formats(formats: Mapping[str, ImageFormat]) -> ImageFormat:
    """Return the formats of named encoders as one."""
    first = next(iter(formats.values()))
    tokens: Any = {name: each.image_token for name, each in formats.items()}
    features: Any = {name: each.features_per_image for name, each in formats.items()}
    token = tokens if first.layout == "placeholder" else first.image_token
    return dataclasses.replace(first, image_token=token, features_per_image=features)


class ModalityStrategy(ABC):
    """How one architecture passes the encoder's features to the decoder.

    Subclasses are dataclasses, or made such by ``register_modality_strategy``: their fields are the
    architecture's options. Only ``prepare`` is abstract.
    """

    arch: ClassVar[str]
    """The name by which ``fuse`` finds the architecture."""

    caches_features: ClassVar[bool] = False
    """Whether layers of the decoder cache keys and values of the features."""

    takes_documents: ClassVar[bool] = False
    """Whether rows may hold several documents, whose ``document_ids`` are passed to ``prepare``."""

    model_class: ClassVar[Any] = None
    """The class of the fused model, below ``FusedModel``. None: ``FusedModel``."""

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        """Build new modules for the decoder, and return a function that puts them in place.

        Whatever can fail happens here, so that the decoder is either fused or unchanged.

        Args:
            decoder: a pretrained decoder.
            encoders: names of the encoders; ``["encoder"]`` for one without a name.
            every: layer ``i`` is fused when ``(i + 1) % every == 0``. None: the architecture's own.

        Raises:
            ConfigError: if the decoder cannot be fused with these options. This method fuses no layer
                and takes no ``every``.
        """
        if every is not None:
            raise ConfigError(
                f"every={every} cannot be given: {type(self).__name__} fuses no layer of the decoder."
            )
        return lambda: None

    def extra_tokens(self, num_features: int) -> int:
        """Return how many positions this many features add to the decoder's sequence."""
        return 0

    def num_image_tokens(self, model: StrategyModel, num_frames: int = 1) -> int:
        """Return how many positions of the decoder's sequence an image takes.

        Args:
            model: the fused model. With several encoders, the sum over an image for each.
            num_frames: frames of a clip, or images per row.

        Raises:
            ConfigError: if the number of features of an image matters and is unknown.
        """
        if not self.special_tokens() and not self.extra_tokens(1):
            return 0
        each = sum(features_per_image(model, name) for name in model.encoder_names)
        return num_frames * each

    def special_tokens(self) -> tuple[int, ...]:
        """Return the ids of placeholders, which must not be generated."""
        return ()

    def placeholder(self, encoder: str) -> int | None:
        """Return the id that the features of an encoder replace; None: they replace none."""
        return next(iter(self.special_tokens()), None)

    def check_encoders(self, names: list[str]) -> None:  # noqa: B027  # most have nothing to check
        """Raise a ``ConfigError`` if the options do not fit encoders of these names."""

    def check_decoder(self, decoder: nn.Module, encoders: Sequence[str]) -> None:  # noqa: B027
        """Raise a ``ConfigError`` if a decoder lacks what ``plan`` would have put in place."""

    def check_prompt(  # noqa: B027  # most have nothing to check
        self,
        names: Sequence[str],
        tokens: Tensor,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
    ) -> None:
        """Raise a ``ConfigError`` if a prompt does not fit its encoder mask, before encoders run.

        Args:
            names: of the encoders.
            tokens: ``[b, s]``.
            encoder_mask: as for ``FusedModel``'s call.
        """

    @abstractmethod
    def prepare(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        *,
        mask: Tensor | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        input_pos: Tensor | None,
        document_ids: Tensor | None = None,
    ) -> ModalityContext:
        """Turn one call of the model into the input of the decoder.

        Args:
            model: the fused model. Whatever must be kept for later calls with caches is read from
                ``model.cache_state`` and returned as ``ModalityContext.cache_state``.
            tokens: ``[b, s]``.
            features: by encoder name, those that this batch has (and stand-ins).
            mask: the caller's mask over tokens, True: may attend.
            encoder_mask: the caller's mask over features, for features cached earlier.
            input_pos: the caller's positions of tokens.
            document_ids: which document each token belongs to, ``[b, s]``, -1: padding; ``mask`` and
                ``input_pos`` are those of the documents. Passed only if rows hold several, and the
                strategy's ``takes_documents`` is True.
        """

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        """Return all options that would build the layers of this decoder as they are."""
        return self.options()

    def statistics(self, model: nn.Module) -> dict[str, Any]:
        """Return numbers about the last forward pass for a report, fit for JSON."""
        return {}

    def options(self) -> dict[str, Any]:
        """Return the options of this strategy that a model and what is loaded into it must share."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


_REGISTRY: Final[dict[str, type[ModalityStrategy]]] = {}
_StrategyType = TypeVar("_StrategyType", bound="type[ModalityStrategy]")


def register_modality_strategy(arch: str) -> Callable[[_StrategyType], _StrategyType]:
    """Register a strategy under the name of its architecture.

    A class that is no dataclass becomes a frozen one, so that its fields are options.

    Args:
        arch: the name.

    Raises:
        ConfigError: if the name is empty, no string or taken; if the class is no ``ModalityStrategy``,
            lacks a method, has options that cannot be read, or is registered already.
    """
    if not isinstance(arch, str) or not arch:
        raise ConfigError(
            "The name of an architecture must be a string that is not empty: "
            f'@register_modality_strategy("mine"). Got {arch!r}.'
        )

    def register(cls: _StrategyType) -> _StrategyType:
        if arch in _REGISTRY:
            raise ConfigError(f"There is an architecture {arch!r} already: {_REGISTRY[arch].__name__}.")
        if problems := list(_class_problems(cls)):
            raise ConfigError(f"{cls!r} cannot be the architecture {arch!r}: {'; '.join(problems)}.")
        if "__dataclass_fields__" not in vars(cls):
            dataclass(frozen=True)(cls)  # in place
        cls.arch = arch
        _REGISTRY[arch] = cls
        return cls

    return register


def _class_problems(cls: Any) -> Iterator[str]:
    if not isinstance(cls, type) or not issubclass(cls, ModalityStrategy):
        yield "it must be a class below ModalityStrategy"
        return
    if inspect.isabstract(cls):
        yield f"it must have the methods {', '.join(sorted(cls.__abstractmethods__))}"
    if names := [name for name, known in _REGISTRY.items() if known is cls]:
        yield f"it is {names[0]!r} already, and a class has one name"
    if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):
        yield "it must be a dataclass, whose fields are its options, and have no __init__ of its own"
    try:
        get_type_hints(cls)
    except Exception as error:
        yield f"the annotations of its options cannot be read ({error})"


def build_modality_strategy(arch: str, **options: Any) -> ModalityStrategy:
    """Build the strategy of an architecture.

    Args:
        arch: ``"cross_attention"``, ``"joint_decoder"``, ``"mot"``, ``"moma"``, ``"deepstack"`` or
            another registered name.
        **options: the architecture's options.

    Raises:
        ConfigError: for an unknown architecture or option, naming the known ones.
    """
    if not isinstance(arch, str) or arch not in _REGISTRY:
        hint = "" if isinstance(arch, str) else " (a name, or for fuse a strategy with its options)"
        known = ", ".join(sorted(_REGISTRY))
        raise ConfigError(f"Unknown architecture {arch!r}{hint}; there are {known}.")
    return call_with_options(_REGISTRY[arch], what=f"architecture {arch!r}", options=options)


def features_per_image(model: StrategyModel, name: str, *, one_tile: bool = False) -> int:
    """Return how many features of one image an encoder and its adapter make.

    Args:
        model: the fused model.
        name: of the encoder, one of ``model.encoder_names``.
        one_tile: where the encoder cuts images into tiles, count the features of one tile; otherwise
            those of all tiles that it pads an image to.

    Raises:
        ConfigError: if the encoder has no ``num_tokens``, or the adapter no ``output_num_tokens``.
    """
    encoder, adapter = unwrap(model.get_encoder(name)), model.get_adapter(name)
    num = getattr(encoder, "tokens_per_tile", None) if one_tile else None
    num = getattr(encoder, "num_tokens", None) if num is None else num
    count: Any = getattr(adapter, "output_num_tokens", None)
    if not isinstance(num, int) or (adapter is not None and count is None):
        unknown = f"adapter of {name!r} ({type(adapter).__name__}) has no output_num_tokens"
        if not isinstance(num, int):
            unknown = f"encoder {name!r} ({type(encoder).__name__}) has no num_tokens"
        raise ConfigError(f"The number of features of an image is unknown: the {unknown}.")
    return num if adapter is None else int(count(num))


def check_rows(tokens: Tensor, features: Mapping[str, EncoderFeatures]) -> None:
    """Raise a ``ConfigError`` unless every encoder has a row of features for each row of tokens."""
    for name, given in features.items():
        if given.present and given.embeds.shape[0] != tokens.shape[0]:
            raise ConfigError(
                f"The features of {name!r} have {given.embeds.shape[0]} rows, the tokens "
                f"{tokens.shape[0]}. There must be a row of features [b, n, d] for each row of text: "
                "pad rows with fewer images, and mask the padding by encoder_mask."
            )
