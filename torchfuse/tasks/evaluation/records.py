"""Predictions as lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchfuse.tasks.evaluation.groups import sample_kind
from torchfuse.tasks.metrics import references
from torchfuse.tasks.prediction import Prediction
from torchfuse.tasks.prompts import prompt_record

__all__ = ["prediction_record"]


def prediction_record(
    prediction: Prediction, folder: str | Path, scores: Mapping[str, float] | None = None
) -> str:
    """Return a prediction as a line of JSON, paths of images relative to the folder of the file.

    Args:
        prediction: a sample and the text that a model answered.
        folder: the folder of the file.
        scores: scores by metric; with them the line has file and row of the sample, too.

    Examples:
        >>> from torchfuse.data import Media, Message, Sample
        >>> question = Message("user", [Media(Path("a/images/7.png")), " which digit ?"])
        >>> sample = Sample([question, Message("assistant", ["seven"])], origin="a/test.json, row 3")
        >>> print(prediction_record(Prediction(sample, "one"), "a/run"))
        ... # doctest: +NORMALIZE_WHITESPACE
        {"kind": "question", "question": "<image> which digit ?", "images": ["../images/7.png"],
         "answer": "seven", "text": "one"}
        >>> print(prediction_record(Prediction(sample, "one"), "a/run", {"exact_match": 0.0}))
        ... # doctest: +NORMALIZE_WHITESPACE
        {"kind": "question", "question": "<image> which digit ?", "images": ["../images/7.png"],
         "answer": "seven", "text": "one", "scores": {"exact_match": 0.0},
         "origin": "a/test.json, row 3"}
    """
    sample, answers = prediction.sample, references(prediction.sample)
    record: dict[str, Any] = {
        "kind": sample_kind(sample),
        **prompt_record(sample.prompt, folder),
        "answer": sample.answer,
        "text": prediction.text,
    }
    if scores is not None:
        record |= {"answers": answers} if len(answers) > 1 else {}
        record |= {"scores": dict(scores), "origin": sample.origin}
    return json.dumps(record)
