"""Scores of predictions by several metrics, and their means by group of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from torchfuse.data.samples import Sample
from torchfuse.errors import ConfigError
from torchfuse.tasks.evaluation.answer_loss import AnswerLoss
from torchfuse.tasks.evaluation.groups import ALL, sample_group
from torchfuse.tasks.metrics import METRICS, references
from torchfuse.tasks.prediction import Prediction

__all__ = [
    "LOSS",
    "Score",
    "Scores",
    "group_scores",
    "metric_problems",
    "score_predictions",
    "score_table",
]

LOSS: Final = "loss"
_NUMBER: Final = "samples"


class Score(NamedTuple):
    """The score of a sample, and its weight in the mean of a group."""

    value: float
    weight: float = 1.0


Scores = Mapping[str, Sequence[Score]]
"""For each metric the scores of all samples."""


def metric_problems(names: Sequence[str]) -> list[str]:
    """Return which names of metrics are unknown or given twice, and whether there is none."""
    known = [*METRICS, LOSS]
    problems = [f"there is no metric {name!r}" for name in dict.fromkeys(names) if name not in known]
    problems += [f"{name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not names:
        problems.append("no metric is given")
    return [f"metrics: {'; '.join(problems)}; there are {', '.join(known)}"] if problems else []


def score_predictions(
    predictions: Sequence[Prediction],
    metrics: Sequence[str] = ("exact_match",),
    losses: Sequence[AnswerLoss] | None = None,
) -> dict[str, list[Score]]:
    """Score predictions.

    Args:
        predictions: samples with the texts that a model answered.
        metrics: any of ``"exact_match"``, ``"contained"``, ``"vqa_accuracy"``, ``"anls"`` and ``"loss"``
            for the loss a token on the reference answers.
        losses: the results of ``answer_losses`` for the samples; needed for ``"loss"``.

    Raises:
        ConfigError: if a metric is unknown, or there are no losses for ``"loss"``.

    Examples:
        >>> from torchfuse.data import Message
        >>> sample = Sample([Message("user", ["Which?"]), Message("assistant", ["cat"])])
        >>> predictions = [Prediction(sample, "cat"), Prediction(sample, "a cat")]
        >>> scores = score_predictions(predictions, ["exact_match", "contained"])
        >>> [score.value for score in scores["exact_match"]]
        [1.0, 0.0]
        >>> group_scores([sample, sample], scores)["all"]
        {'samples': 2, 'exact_match': 0.5, 'contained': 1.0}
    """
    problems = metric_problems(list(metrics))
    if LOSS in metrics and losses is None:
        problems.append(f"the metric {LOSS!r} needs losses, the result of answer_losses")
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")
    scores: dict[str, list[Score]] = {}
    for name in metrics:
        if name == LOSS:
            scores[name] = [Score(loss.mean, loss.count) for loss in losses or ()]
        else:
            metric = METRICS[name]
            scores[name] = [Score(metric(p.text, references(p.sample))) for p in predictions]
    return scores


def group_scores(
    samples: Sequence[Sample], scores: Scores, by: str = "kind"
) -> dict[str, dict[str, float]]:
    """Return the means of scores by group of samples, and of ``"all"`` samples.

    Args:
        samples: the samples.
        scores: their scores by metric.
        by: the groups, see ``sample_group``.

    Returns:
        For each group the number of its ``samples``, and the mean of each metric; that of a loss is a
        mean over tokens.
    """
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample_group(sample, by), []).append(index)
    groups[ALL] = list(range(len(samples)))
    return {
        group: {_NUMBER: len(indices)}
        | {name: _mean([column[i] for i in indices]) for name, column in scores.items()}
        for group, indices in groups.items()
    }


def _mean(scores: Sequence[Score]) -> float:
    return sum(s.value * s.weight for s in scores) / sum(s.weight for s in scores)


def score_table(means: Mapping[str, Mapping[str, float]], by: str | None = "kind") -> str:
    """Return the result of ``group_scores`` as a table; losses as numbers, all else as percentages.

    Args:
        means: for each group its number of samples and its means.
        by: the title of the first column; None: no titles.

    Examples:
        >>> means = {"text": {"samples": 2, "anls": 0.5, "loss": 1.25}}
        >>> print(score_table(means | {"all": {"samples": 12, "anls": 1.0, "loss": 0.0625}}))
        kind    anls    loss
        text   50.0%  1.2500  of 2
        all   100.0%  0.0625  of 12
        >>> print(score_table({"all": {"samples": 12, "anls": 1.0}}, by=None))
        all  100.0%  of 12
    """
    names = [name for name in next(iter(means.values())) if name != _NUMBER]
    titles = [] if by is None else [by]
    width = max(map(len, [*titles, *means]))
    widths = [max(6, len(name) if titles else 0) for name in names]
    lines = []
    if titles:
        cells = (f"  {name:>{w}}" for name, w in zip(names, widths, strict=True))
        lines.append(f"{by:<{width}}" + "".join(cells))
    for group, row in means.items():
        cells = (
            f"  {row[name]:>{w}.4f}" if name == LOSS else f"  {row[name]:>{w}.1%}"
            for name, w in zip(names, widths, strict=True)
        )
        lines.append(f"{group:<{width}}" + "".join(cells) + f"  of {row[_NUMBER]}")
    return "\n".join(lines)
