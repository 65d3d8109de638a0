"""Draw the results of the digits runs: ``loss.png``, ``answers.png`` and ``metrics.json``.

Launch, with the folder that holds the runs:  python -m torchfuse.recipes.draw_digits demo
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from torchfuse.io.atomic import write_file, write_text

INK: Final = "#22252b"
FAINT: Final = "#8a909c"
CORRECT: Final = "#1b7f4d"
INCORRECT: Final = "#c2342c"
COLORS: Final = {
    "cross_attention": "#3d5a98",
    "joint_decoder": "#d1812c",
    "mot": "#2f8f83",
    "moma": "#8a4f9e",
    "deepstack": "#b8405e",
}
# Rows of the grid: title, kind of question, number of cells.
GRID: Final = (
    ("one image", "one_image", 6),
    ("", "one_image", 6),
    ("two images", "two_images", 4),
)
NUM_MISTAKES: Final = 4


def main() -> None:
    """Draw the runs in the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of the runs, for example demo")
    folder: Path = parser.parse_args().folder
    runs = {path.parent.name: path.parent for path in sorted(folder.glob("*/metrics.json"))}
    if not runs:
        parser.error(f"{folder} holds no finished run.")
    metrics = {name: read_json(run / "metrics.json") for name, run in runs.items()}
    text = json.dumps(metrics, indent=2) + "\n"
    write_text(folder / "metrics.json", text)
    set_style()
    draw_losses(
        folder / "loss.png", {name: read_json(run / "losses.json") for name, run in runs.items()}
    )
    shown = "cross_attention" if "cross_attention" in runs else next(iter(runs))
    draw_answers(folder / "answers.png", runs[shown], metrics[shown])
    for name in ("metrics.json", "loss.png", "answers.png"):
        print(f"wrote {folder / name}")


def set_style() -> None:
    """Set font and colors of all figures."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK})


def draw_losses(path: Path, losses: dict[str, list[list[float]]]) -> None:
    """Plot loss against steps, one line for each run."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, history in losses.items():
        steps, values = np.array(history).T
        color = COLORS.get(name)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(values), color=color, linewidth=2, label=name.replace("_", " "))
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_title("Finetuning on questions about digits", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="both", color="#e6e8ec", linewidth=0.6)
    axes.legend(frameon=False)
    save_figure(figure, path)


def draw_answers(path: Path, run: Path, metrics: dict[str, Any]) -> None:
    """Draw a grid of test images with question, prediction and answer, and a row of mistakes."""
    lines = (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    remaining = {kind: _alternate(records, kind) for _, kind, _ in GRID}
    grid = [(title, list(islice(remaining[kind], cells)), cells) for title, kind, cells in GRID]
    wrong = [record for record in records if record["images"] and not _is_correct(record)]
    if wrong:
        title = f"wrong answers ({len(wrong)} of {sum(bool(r['images']) for r in records)})"
        grid.append((title, wrong[:NUM_MISTAKES], NUM_MISTAKES))

    height = 2.7 * len(grid)
    figure = plt.figure(figsize=(13, height))
    rows = figure.add_gridspec(
        len(grid), 1, left=0.02, right=0.98, top=1 - 1.45 / height, bottom=0.65 / height, hspace=0.95
    )
    for row, (title, shown, cells) in zip(rows, grid, strict=True):
        for cell, record in zip(row.subgridspec(1, cells, wspace=0.12), shown, strict=False):
            _draw_answer(figure.add_subplot(cell), record, run)
        if title:
            above = row.get_position(figure).y1 + 0.38 / height
            figure.text(0.02, above, title, fontsize=12, fontweight="bold")
    after = metrics["after"]
    kinds = list(dict.fromkeys(kind for _, kind, _ in GRID))
    shares = ", ".join(f"{kind.replace('_', ' ')} {after[kind]:.1%}" for kind in kinds if kind in after)
    title = f"Answers of the fused model ({run.name.replace('_', ' ')})"
    figure.text(0.02, 1 - 0.42 / height, title, fontsize=17, fontweight="bold")
    subtitle = f"questions about test images; correct: {shares}"
    figure.text(0.02, 1 - 0.7 / height, subtitle, fontsize=11, color=FAINT)
    save_figure(figure, path)


def _alternate(records: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Iterate over the records of a kind, alternating between its questions."""
    by_text: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == kind:
            by_text.setdefault(record["question"], []).append(record)
    for group in zip(*by_text.values(), strict=False):
        yield from group


def _is_correct(record: dict[str, Any]) -> bool:
    return _text(record).split() == record["answer"].split()


def _text(record: dict[str, Any]) -> str:
    """Return the text of a prediction; earlier versions wrote it under "said"."""
    return record["text"] if "text" in record else record["said"]


def _draw_answer(axes: Axes, record: dict[str, Any], run: Path) -> None:
    images = [np.asarray(Image.open(run / name).convert("L")) for name in record["images"]]
    gap = np.zeros((images[0].shape[0], 2), dtype=np.uint8)
    row = np.concatenate([part for image in images for part in (gap, image)][1:], axis=1)
    axes.axis("off")
    axes.imshow(255 - row, cmap="gray", vmin=0, vmax=255, interpolation="lanczos")
    question = record["question"].replace("<image>", "").strip().replace(" ?", "?")
    axes.set_title(question, fontsize=10, color=INK, pad=6)
    text = _text(record) or "(nothing)"
    color = CORRECT if _is_correct(record) else INCORRECT
    _write_below(axes, text, 6, fontsize=14, fontweight="bold", color=color)
    _write_below(axes, f"truth: {record['answer']}", 25, fontsize=9, color=FAINT)


def _write_below(axes: Axes, text: str, points: int, **style: Any) -> None:
    axes.annotate(
        text,
        (0.5, 0),
        (0, -points),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="top",
        **style,
    )


def _smooth(values: np.ndarray, window: int = 25) -> np.ndarray:
    """Return the mean of the last ``window`` values at each step."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically."""

    def write(file: Path) -> None:
        figure.savefig(file, dpi=120, facecolor="white", format="png")

    write_file(path, write)
    plt.close(figure)


if __name__ == "__main__":
    main()
