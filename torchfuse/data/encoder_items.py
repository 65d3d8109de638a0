"""Which encoder takes which media, and what its items become in a sequence.

A model with one encoder passes all media to it. With several, each is named as the modality that it
encodes: ``image``, ``audio``, or whatever records have. Videos are frames, so that an encoder of images
takes them where none is named ``video``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchfuse.errors import ConfigError, DataError

__all__ = [
    "UNNAMED",
    "ItemFormat",
    "ItemFormats",
    "Items",
    "options_of_model",
]

UNNAMED = ""
"""The one encoder without a name, as in ``padded_collate_images``."""


class Items(NamedTuple):
    """The items of one medium: tiles of an image, frames of a video.

    Attributes:
        encoder: the name of the encoder that takes them.
        number: how many there are.
    """

    encoder: str
    number: int


class ItemFormat(NamedTuple):
    """What an item of an encoder becomes in a sequence.

    Attributes:
        token: id of the encoder's tokens; None where a sequence has none.
        num_features: features of an item.
    """

    token: int | None
    num_features: int


class ItemFormats:
    """What items of media become in a sequence, by the encoder that takes them.

    Args:
        tokens: id of the tokens of images; by name where encoders have tokens of their own.
        num_features: features of an item; by name for named encoders.

    Attributes:
        by_encoder: the format of each encoder; ``""`` is the one without a name.

    Raises:
        ConfigError: if the names differ.

    Examples:
        >>> formats = ItemFormats(9, {"image": 4, "audio": 7})
        >>> formats.encoder_of("video"), formats.num_features([Items("image", 3)])
        ('image', {'image': 12, 'audio': 0})
    """

    def __init__(
        self, tokens: int | Mapping[str, int] | None, num_features: int | Mapping[str, int]
    ) -> None:
        if not isinstance(num_features, Mapping):
            if isinstance(tokens, Mapping):
                raise ConfigError(
                    f"image_token is by encoder, {dict(tokens)}: features_per_image must be too, got "
                    f"{num_features}."
                )
            num_features = {UNNAMED: num_features}
        by_name = tokens if isinstance(tokens, Mapping) else dict.fromkeys(num_features, tokens)
        if not num_features or by_name.keys() != num_features.keys():
            raise ConfigError(
                "image_token and features_per_image must have the same encoders, got "
                f"{', '.join(by_name) or 'none'} and {', '.join(num_features) or 'none'}."
            )
        self.by_encoder = {
            name: ItemFormat(by_name[name], number) for name, number in num_features.items()
        }

    def check_modalities(self, modalities: Sequence[str]) -> None:
        """Raise a ``ConfigError`` for one of several encoders that has another name than these."""
        unused = [name for name in self.by_encoder if name not in modalities]
        if unused and len(self.by_encoder) > 1:
            raise ConfigError(
                f"No media are for {', '.join(unused)}: each of several encoders is named as the "
                "modality that it encodes. image needs image_transform, any other a transform of its "
                "name in media_transforms; there are transforms for "
                f"{', '.join(modalities) or 'nothing'}."
            )

    def encoder_of(self, modality: str) -> str:
        """Return the name of the encoder that takes media of a modality.

        Raises:
            DataError: if none of several encoders does.
        """
        if len(self.by_encoder) == 1:
            return next(iter(self.by_encoder))
        for name in (modality, *["image"] * (modality == "video")):
            if name in self.by_encoder:
                return name
        raise DataError(
            f"No encoder takes media of the modality {modality}: there are "
            f"{', '.join(self.by_encoder)}, each for the modality of its name."
        )

    def num_features(self, items: Sequence[Items]) -> dict[str, int]:
        """Return the number of features of items by encoder."""
        return {
            name: each.num_features * sum(number for encoder, number in items if encoder == name)
            for name, each in self.by_encoder.items()
        }

    def max_features(self, num_items: int) -> int:
        """Return the most features that this many items have, whatever their encoder."""
        return num_items * max(each.num_features for each in self.by_encoder.values())


def options_of_model(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``SampleTransform`` that fit a model.

    Args:
        own: what the model determines, see its ``image_format``; None: it does not.
        given: other arguments.

    Raises:
        ConfigError: naming each argument that is missing or does not fit the model.
    """
    own, given = {key: value for key, value in own.items() if value is not None}, dict(given)
    features = own.get("features_per_image")
    if isinstance(features, Mapping) and None in features.values():
        one = given.pop("features_per_image", None)
        features = {name: one if number is None else number for name, number in features.items()}
        own = {**own, "features_per_image": features}
    problems = [
        f"{key} is {given[key]!r}, and the model's is {value!r}"
        for key, value in own.items()
        if key != "scope" and given.get(key, value) != value
    ]
    result = {"image_token": None, **own, **given}
    if result.get("layout") == "marker" and result["image_token"] is None:
        problems.append(
            "the model has no token for images: fuse(..., fusion_vocab_size=1) adds one, or give "
            "image_token, the id of one that the tokenizer has"
        )
    if features is None and "features_per_image" not in given:
        problems.append("features_per_image must be given: for this encoder it is unknown")
    if isinstance(features, Mapping) and None in features.values():
        unknown = ", ".join(name for name, number in features.items() if number is None)
        problems.append(f"features_per_image must be given: for {unknown} it is unknown")
    if problems:
        raise ConfigError(f"The transform does not fit the model: {'; '.join(problems)}.")
    return result
