"""Rows of batches: one sample each, or several that are packed."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.documents import merge_documents
from torchfuse.data.loading.options import Encoder, LoaderOptions
from torchfuse.data.truncate import fit_to_length
from torchfuse.data.workers import WorkerWatch, sample_name
from torchfuse.errors import FusionError

__all__ = ["Batch", "Collate", "Row", "Rows"]

Batch = dict[str, Any]
Row = tuple[int, ...]  # indices of the samples that share a sequence


@dataclass
class Rows(Dataset[dict[str, Any]]):
    """Rows by the indices of their samples.

    Whatever a sample raises is returned as text: a worker's error would reach the user with the worker's
    traceback in its message, one that cannot be pickled would not arrive at all, and a ``StopIteration``
    would end the training as if it were complete.

    Attributes:
        samples: the samples.
        transform: turns a sample into a sequence.
        options: how rows are made.
        watch: notes which sample each worker is reading.
    """

    samples: Sequence[Any]
    transform: Encoder
    options: LoaderOptions
    watch: WorkerWatch

    def __getitem__(self, row: Row) -> dict[str, Any]:
        documents: list[Mapping[str, Any]] = []
        result: dict[str, Any] = {"bad": [], "too_long": 0}
        for index in row:
            self.watch.note(index)
            try:
                document = self._fitted(self.samples[index])
            except Exception as error:  # a transform of the user's own can raise anything
                result["bad"].append(self._problem(index, error))
            else:
                result["too_long"] += document is None
                documents += [] if document is None else [document]
        self.watch.note()
        if not documents:
            documents.append(_nothing_to_learn(self.transform.pad_id))
        if self.options.packed:
            assert self.options.max_seq_len is not None
            layout, pad_id = self.transform.layout, self.transform.pad_id
            length = self.options.max_seq_len
            return merge_documents(documents, length, layout=layout, padding_idx=pad_id) | result
        return {**documents[0], **result}

    def _problem(self, index: int, error: Exception) -> str:
        """Return the message of an error, with file and row."""
        text, name = str(error), sample_name(self.samples, index)
        if not isinstance(error, FusionError):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {text} ({Path(frame.filename).name}, line {frame.lineno})"
        elif not hasattr(self.samples, "origin") or text.startswith(name):
            return text
        return f"{name}: {text}"

    def _fitted(self, sample: Any) -> Mapping[str, Any] | None:
        """Return the document of a sample, None if it is too long."""
        document, room = self.transform(sample), self.options.max_seq_len
        if room is None:
            return document
        prefix = self.transform.layout == "prefix"
        return fit_to_length(document, room, too_long=self.options.too_long, prefix=prefix)


def _nothing_to_learn(pad_id: int) -> dict[str, Any]:
    """Return a document for a row without any, so that every rank has a batch."""
    return {
        "tokens": [pad_id],
        "labels": [-100],
        "images": torch.empty(0, 3, 1, 1),
        "encoder_mask": torch.empty(1, 0, dtype=torch.bool),
    }


@dataclass
class Collate:
    """Make a batch of rows, with the messages and counts of what was left out of them."""

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        bad = [message for row in rows for message in row.pop("bad")]
        too_long = sum(row.pop("too_long") for row in rows)
        return {**padded_collate_images(rows, self.pad_id), "bad": bad, "too_long": too_long}
