"""Rows of batches: one sample each, or several that are packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.documents import merge_documents
from torchfuse.data.loading.options import Encoder, LoaderOptions
from torchfuse.data.truncate import fit_to_length
from torchfuse.errors import DataError

__all__ = ["Batch", "Collate", "Row", "Rows"]

Batch = dict[str, Any]
Row = tuple[int, ...]  # indices of the samples that share a sequence


@dataclass
class Rows(Dataset[dict[str, Any]]):
    """Rows by the indices of their samples.

    What cannot be used is returned as text, not raised: the error of a worker would reach the user with
    the worker's traceback in its message.
    """

    samples: Sequence[Any]
    transform: Encoder
    options: LoaderOptions

    def __getitem__(self, row: Row) -> dict[str, Any]:
        documents: list[Mapping[str, Any]] = []
        result: dict[str, Any] = {"bad": [], "too_long": 0}
        for index in row:
            try:
                document = self._fitted(self.samples[index])
            except DataError as error:
                result["bad"].append(str(error))
            else:
                result["too_long"] += document is None
                documents += [] if document is None else [document]
        if not documents:
            documents.append(_nothing_to_learn(self.transform.pad_id))
        if self.options.packed:
            assert self.options.max_seq_len is not None
            layout, pad_id = self.transform.layout, self.transform.pad_id
            length = self.options.max_seq_len
            return merge_documents(documents, length, layout=layout, padding_idx=pad_id) | result
        return {**documents[0], **result}

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
