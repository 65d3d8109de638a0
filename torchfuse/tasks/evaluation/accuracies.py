"""The share of correct answers, by kind of sample, and with images swapped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torchfuse.data.samples import Sample
from torchfuse.errors import DataError
from torchfuse.tasks.evaluation.scores import group_scores, score_predictions
from torchfuse.tasks.evaluation.swap import media_modalities, swap_images
from torchfuse.tasks.prediction import Prediction

__all__ = ["accuracy", "accuracy_by_kind", "accuracy_table", "evaluate"]


def accuracy(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return the share of correct answers by kind of sample, and of ``"all"`` samples.

    Raises:
        DataError: if a sample has no answer to compare with.
    """
    unknown = sum(p.sample.answer is None for p in predictions)
    if unknown or not predictions:
        raise DataError(f"{unknown} of {len(predictions)} samples have no answer to compare with.")
    means = group_scores([p.sample for p in predictions], score_predictions(predictions))
    return {kind: row["exact_match"] for kind, row in means.items()}


def accuracy_by_kind(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return ``accuracy`` without ``"all"``, rounded to four digits."""
    return {kind: round(share, 4) for kind, share in accuracy(predictions).items() if kind != "all"}


def accuracy_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Return several results of ``accuracy`` as the columns of a table.

    Args:
        shares: for each column the share of correct answers by kind of sample.

    Examples:
        >>> print(accuracy_table({"before": {"text": 1.0}, "after": {"one_image": 0.987, "text": 1.0}}))
        accuracy             before             after
        text                 100.0%            100.0%
        one_image                               98.7%
    """
    if not shares:
        return "no sample was answered"
    kinds = list(dict.fromkeys(kind for by_kind in shares.values() for kind in by_kind))
    width = max(map(len, ["accuracy", *kinds]))
    lines = [f"{'accuracy':<{width}}" + "".join(f"  {name:>16}" for name in shares)]
    for kind in kinds:
        cells = [f"{by_kind[kind]:.1%}" if kind in by_kind else "" for by_kind in shares.values()]
        lines.append(f"{kind:<{width}}" + "".join(f"  {cell:>16}" for cell in cells))
    return "\n".join(lines)


def evaluate(
    predict: Callable[[list[Sample]], list[Prediction]], samples: Sequence[Sample], seed: int = 0
) -> tuple[list[Prediction], dict[str, dict[str, float]]]:
    """Evaluate a trained model on samples, and again with their images swapped.

    Args:
        predict: answers samples.
        samples: samples with answers.
        seed: see ``swap_images``.

    Returns:
        The predictions, and accuracy by kind of sample: ``"after"`` training (of ``"all"`` too), and
        with ``"images_exchanged"`` where samples have images to swap. Both empty without samples.
    """
    if not samples:
        return [], {}
    predictions = predict(list(samples))
    shares = {"after": accuracy_by_kind(predictions) | {"all": round(accuracy(predictions)["all"], 4)}}
    numbers = Counter(map(media_modalities, samples))
    if with_images := [s for s in samples if s.media and numbers[media_modalities(s)] > 1]:
        # Without "all", which would be of fewer samples than the other.
        shares["images_exchanged"] = accuracy_by_kind(predict(swap_images(with_images, seed)))
    return predictions, shares
