"""Reading of features in place of pixels."""

from __future__ import annotations

from torchfuse.data.features.store import FeatureStore
from torchfuse.data.media import MediaInput
from torchfuse.data.media_reader import MediaReader
from torchfuse.data.samples import Media
from torchfuse.errors import DataError

__all__ = ["FeatureReader"]


class FeatureReader:
    """Read features of media from a store, where a ``MediaReader`` would read pixels.

    Args:
        store: the features.
        source: reads what they were computed from.
        keyword: the model's keyword of the output of an encoder.
    """

    def __init__(self, store: FeatureStore, source: MediaReader, keyword: str) -> None:
        self.store, self.source, self._keyword = store, source, keyword

    @property
    def modalities(self) -> list[str]:
        """The modalities that have a transform."""
        return self.source.modalities

    def __call__(self, media: Media) -> MediaInput:
        """Return the features of media, ``[t, n, d_e]`` for ``t`` images, tiles or frames.

        Raises:
            DataError: if the file cannot be read, or has no features.
        """
        features = self.store.get(media)
        if features is None:
            raise self._missing(media)
        return MediaInput(features, keyword=self._keyword)

    def num_items(self, media: Media) -> int:
        """Return the number of images, tiles or frames of media.

        Raises:
            DataError: as for a call.
        """
        count = self.store.num_items(media)
        if count is None:
            raise self._missing(media)
        return count

    def _missing(self, media: Media) -> DataError:
        try:
            self.source(media)
        except DataError as error:
            return error
        return DataError(
            f"The {media.modality} {media} has no features in {self.store.folder}: it was changed after "
            "they were computed, or it is not in the data that they were computed for. Start again: "
            "what is missing is computed at start."
        )
