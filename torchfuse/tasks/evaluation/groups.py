"""Groups of samples: by kind, by source, by the modalities of their media, or by another field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torchfuse.data.samples import Sample

__all__ = ["ALL", "group_problems", "sample_group", "sample_kind"]

ALL: Final = "all"  # the group of all samples
_NONE: Final = "(none)"  # the group of samples without the field


def sample_kind(sample: Sample) -> str:
    """Return the kind of a sample: ``kind`` of its metadata, or ``"question"``."""
    return str(sample.metadata.get("kind", "question"))


def sample_group(sample: Sample, by: str) -> str:
    """Return the group of a sample.

    Args:
        sample: the sample.
        by: ``"kind"``: see ``sample_kind``; ``"source"``: ``source`` of its metadata, or else its file;
            ``"modality"``: the modalities of its media, or ``"text"``; anything else is a field of its
            metadata.

    Examples:
        >>> from torchfuse.data import Media, Message
        >>> clip = Media(data=b"0", modality="video")
        >>> sample = Sample([Message("user", ["Which?", clip])], {"topic": 7}, "test.json, row 3")
        >>> [sample_group(sample, by) for by in ("kind", "source", "modality", "topic", "level")]
        ['question', 'test.json', 'video', '7', '(none)']
    """
    if by == "kind":
        return sample_kind(sample)
    if by == "modality":
        return "+".join(sorted({media.modality for media in sample.media})) or "text"
    value = sample.metadata.get(by)
    if value is None and by == "source":
        value = sample.origin.rpartition(", ")[0] or None
    return _NONE if value is None else str(value)


def group_problems(samples: Sequence[Sample], by: str) -> list[str]:
    """Return why samples cannot be grouped: none has the field, or a group has the name ``"all"``."""
    groups = {sample_group(sample, by) for sample in samples}
    if groups == {_NONE}:
        fields = sorted({str(name) for sample in samples for name in sample.metadata})
        known = ", ".join(dict.fromkeys(["kind", "source", "modality", *fields]))
        return [f"by must be a field of the samples, got {by!r}, which none has; there are {known}"]
    if ALL in groups:
        return [f"{by} {ALL!r} means the samples of every {by}; choose another name in the file"]
    return []
