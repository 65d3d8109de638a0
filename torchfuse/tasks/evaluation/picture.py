"""A picture of predictions: some that are right and some that are wrong, with their images."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchfuse.data.images import open_image
from torchfuse.data.samples import Sample
from torchfuse.errors import ConfigError
from torchfuse.tasks.metrics import references
from torchfuse.tasks.prediction import Prediction
from torchfuse.tasks.prompts import message_text

__all__ = ["check_matplotlib", "draw_predictions"]

_RIGHT: Final = "#1b7f4d"
_WRONG: Final = "#c2342c"
_FAINT: Final = "#8a909c"
_COLUMNS: Final = 4
_LETTERS: Final = 34  # in a line of a cell
_SIZE: Final = 192  # pixels of an image's longer side


def check_matplotlib() -> None:
    """Raise a ``ConfigError`` if there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "The picture of predictions needs matplotlib: pip install 'torchfuse[demo]'; num_shown=0 in "
            "the recipe draws none."
        ) from error


def draw_predictions(
    path: str | Path,
    predictions: Sequence[Prediction],
    scores: Sequence[float],
    *,
    num_each: int = 8,
    title: str = "",
) -> None:
    """Draw samples that were answered right and samples that were not: image, question and answers.

    Args:
        path: the PNG file.
        predictions: samples with the texts that a model answered.
        scores: a score for each; 1 is right, less is wrong.
        num_each: the most samples to draw of both; they are spread over all.
        title: text above them.

    Raises:
        ConfigError: if matplotlib is not installed.
        DataError: if an image cannot be read.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    pairs = list(zip(predictions, scores, strict=True))
    parts = {
        "right": [pair for pair in pairs if pair[1] == 1],
        "wrong": [pair for pair in pairs if pair[1] != 1],
    }
    shown = {name: _spread(part, num_each) for name, part in parts.items()}
    rows = {name: -(-len(part) // _COLUMNS) for name, part in shown.items()}
    height = 3.2 * sum(rows.values()) + 0.9
    figure = Figure(figsize=(13, height))
    figure.text(0.02, 1 - 0.4 / height, title, fontsize=15, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(
        max(1, sum(rows.values())),
        _COLUMNS,
        left=0.02,
        right=0.98,
        top=1 - 1 / height,
        bottom=0,
        hspace=0.12,
    )
    first = 0
    for name, part in shown.items():
        for number, (prediction, score) in enumerate(part):
            axes = figure.add_subplot(grid[first + number // _COLUMNS, number % _COLUMNS])
            _draw_cell(axes, prediction, score)
            if not number:
                heading = f"{name}: {len(parts[name])} of {len(pairs)}"
                axes.set_title(heading, loc="left", fontsize=11, color=_FAINT)
        first += rows[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of scripts that the font lacks
        figure.savefig(path, format="png", dpi=100)


def _spread(pairs: Sequence[Any], most: int) -> list[Any]:
    """Return up to so many of the pairs, evenly spaced."""
    count = min(most, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _draw_cell(axes: Any, prediction: Prediction, score: float) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    images = [open_image(image) for image in prediction.sample.images[:2]]
    for place, image in enumerate(images):
        image.thumbnail((_SIZE, _SIZE))
        box = axes.inset_axes((place * 0.5, 0.42, 0.47, 0.56))
        box.imshow(image, cmap="gray", aspect="equal")
        box.set_axis_off()
        box.set_anchor("NW")
    y = 0.38 if images else 0.95
    color = _RIGHT if score == 1 else _WRONG
    for text, style in (
        (_question(prediction.sample), {}),
        (f"answer: {' | '.join(dict.fromkeys(references(prediction.sample)))}", {"color": _FAINT}),
        (f"model{f' ({score:.2f})' * (0 < score < 1)}: {prediction.text}", {"color": color}),
    ):
        lines = textwrap.wrap(text, _LETTERS, max_lines=2, placeholder=" ...")
        axes.text(0, y, "\n".join(lines), va="top", fontsize=9.5, parse_math=False, **style)
        y -= 0.075 * len(lines) + 0.01


def _question(sample: Sample) -> str:
    return message_text(sample.prompt[-1]).replace("<image>", "").strip()
