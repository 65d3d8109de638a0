"""Media of samples whose features are missing, read by worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import Dataset

from torchfuse.data.features.store import FeatureStore, hash_file
from torchfuse.data.media import MediaInput
from torchfuse.data.media_reader import MediaReader
from torchfuse.data.samples import Media, Sample
from torchfuse.data.workers import WorkerWatch
from torchfuse.errors import DataError

__all__ = ["FoundMedia", "MissingMedia"]


class FoundMedia(NamedTuple):
    """Media with something to remember.

    Attributes:
        name: of their features.
        digest: SHA-256 of the encoded bytes.
        file: the ``hash_file`` of a file that was not read before; None otherwise.
        inputs: what the encoder takes; None if there are features.
    """

    name: str
    digest: str
    file: int | None
    inputs: MediaInput | None


@dataclass
class MissingMedia(Dataset[list[FoundMedia]]):
    """A rank's share of the media of samples, without those that a store has, each once.

    Samples and media that cannot be read are left out.
    """

    samples: Sequence[Sample]
    reader: MediaReader
    store: FeatureStore
    watch: WorkerWatch
    rank: int = 0
    world_size: int = 1
    _seen: set[tuple[str, int]] = field(default_factory=set)

    def __getitem__(self, indices: Sequence[int]) -> list[FoundMedia]:
        found = []
        for index in indices:
            self.watch.note(index)
            try:
                media = self.samples[index].media
            except DataError:
                continue
            for each in media:
                try:
                    found += self._look_up(each)
                except Exception:  # a transform of the user's own can raise anything
                    continue
        self.watch.note()
        return found

    def _look_up(self, media: Media) -> list[FoundMedia]:
        file = hash_file(media)
        digest = media.digest() if file is None else self.store.known_digest(file)
        key = int(digest[:16], 16) if file is None and digest is not None else file
        assert key is not None
        if key % self.world_size != self.rank or (media.modality, key) in self._seen:
            return []
        self._seen.add((media.modality, key))
        new_file = file if digest is None else None
        digest = digest or media.digest()
        name = self.store.name(media, digest)
        inputs = None if name in self.store else self.reader(media)
        is_known = new_file is None and inputs is None
        return [] if is_known else [FoundMedia(name, digest, new_file, inputs)]
