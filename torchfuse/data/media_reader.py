"""Reading of media: each modality has a transform, which turns a file into what its encoder takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchfuse.components import build, resolve
from torchfuse.data.images import (
    GridImageTransform,
    ImageTransform,
    TiledImageTransform,
    image_size,
    open_image,
)
from torchfuse.data.media import MediaInput, MediaTransform, as_media_input
from torchfuse.data.samples import Media
from torchfuse.data.video import VideoTransform
from torchfuse.errors import ConfigError, DataError
from torchfuse.options import call_with_options

__all__ = ["MediaCache", "MediaReader"]


class MediaReader:
    """Turn images, videos and other media into what an encoder takes.

    Args:
        image_transform: an ``ImageTransform``, or the directory of the encoder's image processor. None
            where there are no images.
        others: the transform of each other modality: a function of a ``Media``, or the dotted path of
            one, or, as a section of a configuration, ``_component_`` (the dotted path of a class or
            function that returns one) and its keywords. ``video`` may hold keywords of
            ``VideoTransform`` alone.

    Raises:
        ConfigError: if a component does not exist, does not take its keywords or is no function, or
            if a video is to be read without ``image_transform``.
        CheckpointError: if the directory holds no image processor, or one that is not supported.

    Examples:
        >>> import torch
        >>> reader = MediaReader(None, {"sound": lambda media: torch.zeros(len(media.read()))})
        >>> reader(Media(data=b"12345", modality="sound")).items.shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        image_transform: ImageTransform | str | Path | None,
        others: Mapping[str, MediaTransform | Mapping[str, Any] | str] | None = None,
    ) -> None:
        if isinstance(image_transform, str | Path):
            image_transform = ImageTransform.from_directory(image_transform)
        self.image_transform = image_transform
        self._others = {name: self._transform(name, given) for name, given in (others or {}).items()}

    @property
    def modalities(self) -> list[str]:
        """The modalities that have a transform."""
        return [*["image"] * (self.image_transform is not None), *self._others]

    def _transform(self, modality: str, given: Any) -> MediaTransform:
        if modality == "image":
            raise ConfigError("The transform of images is image_transform.")
        if modality == "video" and isinstance(given, Mapping) and "_component_" not in given:
            if self.image_transform is None:
                raise ConfigError("video: frames need image_transform.")
            return call_with_options(VideoTransform, self.image_transform, what=modality, options=given)
        if isinstance(given, Mapping):
            given = build(given, what=modality)
        elif isinstance(given, str):
            given = resolve(given, what=modality)
        if not callable(given):
            raise ConfigError(f"{modality} must be a function of a Media, got {given!r}.")
        return given

    def __call__(self, media: Media) -> MediaInput:
        """Read media.

        Raises:
            DataError: if the file cannot be read, or its modality has no transform.
            ConfigError: if a transform returns anything but a tensor or a ``MediaInput``.
        """
        if media.modality == "image" and self.image_transform is not None:
            image = open_image(media)
            try:
                return self.image_transform.media_input(image)
            except DataError as error:
                raise DataError(f"The image {media} cannot be used: {error}") from error
        result = self._other(media)(media)
        if not isinstance(result, Tensor | MediaInput):
            raise ConfigError(
                f"The transform of {media.modality} must return a tensor or a MediaInput, got a "
                f"{type(result).__name__}."
            )
        return as_media_input(result)

    def num_items(self, media: Media) -> int:
        """Return the number of items that media become: 1, or the tiles or frames.

        Images and videos are not decoded. A transform of another modality is called, unless it has a
        method ``num_items`` that takes a ``Media``.

        Raises:
            DataError: as for a call.
        """
        if media.modality == "image" and self.image_transform is not None:
            if isinstance(self.image_transform, TiledImageTransform | GridImageTransform):
                return self.image_transform.num_items(image_size(media))
            return 1
        count = getattr(self._other(media), "num_items", None)
        return self(media).num_items if count is None else int(count(media))

    def _other(self, media: Media) -> MediaTransform:
        if media.modality not in self._others:
            raise DataError(
                f"The {media.modality} {media} cannot be read: there are transforms for "
                f"{', '.join(self.modalities) or 'nothing'}."
            )
        return self._others[media.modality]


class MediaCache:
    """The media that were read last. A copy, in another process too, begins empty.

    Args:
        size: how many to keep.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._inputs: OrderedDict[Media, MediaInput] = OrderedDict()

    def get(self, media: Media, read: Callable[[Media], MediaInput]) -> MediaInput:
        """Return what ``read`` makes of media."""
        if media in self._inputs:
            self._inputs.move_to_end(media)
            return self._inputs[media]
        made = read(media)
        if self._size:
            self._inputs[media] = made
            if len(self._inputs) > self._size:
                self._inputs.popitem(last=False)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return MediaCache, (self._size,)
