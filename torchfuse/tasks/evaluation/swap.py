"""Samples with the images of others: a model whose answers depend on images gets them wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torchfuse.data.samples import Media, Sample
from torchfuse.errors import DataError

__all__ = ["media_modalities", "swap_images"]


def swap_images(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Give each sample the images of another one with as many; drop those without such another.

    A model whose answers depend on its images gets most of these wrong. Videos and other media are
    swapped likewise.

    Args:
        samples: samples with images.
        seed: of the order in which images are swapped.

    Raises:
        DataError: if no two samples have the same number of images.
    """
    by_media: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_media.setdefault(media_modalities(sample), []).append(index)
    swapped: dict[int, Sample] = {}
    rng = random.Random(seed)
    for modalities, indices in by_media.items():
        if len(indices) < 2 or not modalities:
            continue
        rng.shuffle(indices)
        for index, other in zip(indices, indices[1:] + indices[:1], strict=True):
            swapped[index] = _with_media(samples[index], samples[other].media)
    if not swapped:
        raise DataError("No two samples have the same number of images, so none can be swapped.")
    return [swapped[index] for index in sorted(swapped)]


def media_modalities(sample: Sample) -> tuple[str, ...]:
    """Return the modality of each of a sample's media, in their order."""
    return tuple(media.modality for media in sample.media)


def _with_media(sample: Sample, media: Sequence[Media]) -> Sample:
    """Return a sample with other media in the places of its own."""
    given = iter(media)
    messages = [
        replace(
            message,
            content=[part if isinstance(part, str) else next(given) for part in message.content],
        )
        for message in sample.messages
    ]
    return replace(sample, messages=messages)
