"""All samples of a set that is small enough, with all of its errors in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from torchfuse.data.images import open_image
from torchfuse.data.samples import Media, Sample
from torchfuse.errors import DataError, name_problems

__all__ = ["media_problems", "read_all"]


def read_all(given: Sequence[Sample], path: str | Path) -> list[Sample]:
    """Read all samples, and check that every image in them opens.

    Args:
        given: the samples.
        path: their file, for messages.

    Raises:
        DataError: naming every row that is wrong.
    """
    samples, problems = [], []
    checked: dict[Media, str] = {}
    bar = tqdm(range(len(given)), desc=f"check {Path(path).name}", disable=None, leave=False)
    for index in bar:
        try:
            samples.append(given[index])
        except DataError as error:
            problems.append(str(error))
        else:
            origin = samples[-1].origin
            problems += [f"{origin}: {each}" for each in media_problems(samples[-1].media, checked)]
    if problems:
        raise DataError(name_problems(path, [p.removeprefix(f"{path}, ") for p in problems]))
    return samples


def media_problems(media: Sequence[Media], checked: dict[Media, str]) -> list[str]:
    """Return which images cannot be used; ``checked`` has the results of earlier calls."""
    images = dict.fromkeys(each for each in media if each.modality == "image")
    for image in images:
        if image not in checked:
            try:
                open_image(image)
            except DataError as error:
                checked[image] = str(error)
            else:
                checked[image] = ""
    return [checked[image] for image in images if checked[image]]
