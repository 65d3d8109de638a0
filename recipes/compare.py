"""Finetune several architectures on the same data and budget, and plot their accuracy.

Each run is the finetune recipe in a process of its own, one after the other, and writes to a folder
below ``output_dir``. The figure and its numbers are written beside that: for ``demo/compare`` they are
``demo/compare.png`` and ``demo/compare.json``.

Launch:

    tune run torchfuse/recipes/compare.py --config recipes/configs/digits/compare.yaml
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from omegaconf import MISSING, DictConfig, OmegaConf
from torchfuse.recipes import finetune, finetune_checks, finetune_config
from torchfuse.recipes.draw_digits import COLORS, FAINT, read_json, save_figure, set_style
from tqdm import tqdm

from torchfuse.errors import ConfigError
from torchfuse.io.atomic import write_text
from torchfuse.training.config import read_config, recipe, typed

# Keys in which compared runs may differ.
VARIABLE_KEYS: Final = ("output_dir", "model", "transform", "freeze", "train.lr", "train.weight_decay")
# The range of accuracies in the figure, and the ticks of its axis.
AXIS: Final = (0.01, 0.995)
TICKS: Final = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass
class Config:
    """Keys of the recipe.

    Attributes:
        output_dir: folder of the runs, and the name of the figure and its numbers.
        configs: configurations of the finetune recipe.
        budget: keys of the finetune recipe that replace those of each configuration.
    """

    output_dir: str = MISSING
    configs: list[str] = MISSING
    budget: dict[str, Any] = field(default_factory=dict)


@recipe(Config)
def main(config: Config) -> None:
    """Finetune several architectures on the same data and budget, and plot their accuracy."""
    runs = _read_runs(config)
    with tqdm(runs.items(), desc="compare", disable=None) as bar:
        for name, given in bar:
            bar.write(f"\n{name}")
            sys.stdout.flush()
            _finetune(name, given)
    metrics = {name: read_json(Path(given.output_dir) / "metrics.json") for name, given in runs.items()}
    numbers, picture = Path(f"{config.output_dir}.json"), Path(f"{config.output_dir}.png")
    text = json.dumps({"budget": config.budget, "runs": metrics}, indent=2) + "\n"
    write_text(numbers, text)
    draw(picture, metrics)
    print(f"{table(metrics)}\n\nwrote {picture} and {numbers}")


def _read_runs(config: Config) -> dict[str, DictConfig]:
    """Return the configurations of all runs by name, checked and comparable."""
    runs: dict[str, DictConfig] = {}
    checked: dict[str, dict[str, Any]] = {}
    problems = [] if config.configs else ["configs must list at least one configuration"]
    for path in config.configs:
        name = Path(path).stem
        if name in runs:
            problems.append(f"{path}: there is a run named {name} already")
            continue
        try:
            given = read_config(path, "configs lists configurations of the finetune recipe")
            own = {"output_dir": f"{config.output_dir}/{name}"}
            runs[name] = OmegaConf.merge(given, config.budget, own)  # type: ignore[assignment]
            known = typed(runs[name], finetune_config.Config)
            finetune_checks.check_config(known)
        except ValueError as error:
            problems.append(f"{path}: {str(error).rstrip('.')}")
            continue
        checked[path] = dict(finetune_checks.flat(asdict(known)))
        if known.eval_every is None or known.data.test is None:
            problems.append(
                f"{path}: eval_every and data.test must be given: accuracy during training is plotted"
            )
    if checked:
        first, *others = checked
        for path in others:
            names = [n for n in {**checked[first], **checked[path]} if not n.startswith(VARIABLE_KEYS)]
            differ = [n for n in names if checked[first].get(n) != checked[path].get(n)]
            if differ:
                problems.append(
                    f"{path}: differs from {first} in {', '.join(differ)}; budget sets keys of all runs"
                )
    if problems:
        raise ConfigError(f"{'; '.join(problems)}.")
    return runs


def _finetune(name: str, given: DictConfig) -> None:
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(OmegaConf.to_yaml(given), encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", finetune.__name__, "--config", str(file)])
    if done.returncode:
        raise ConfigError(f"the run {name} ended with exit code {done.returncode}, see above.")


def _columns(metrics: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return the columns of the table: by title, a cell for each run."""
    runs = list(metrics.values())
    columns = {
        "new parameters": [f"{run['new_parameters']:,}" for run in runs],
        "training": [f"{run['training_seconds']:.0f} s" for run in runs],
        "tokens/s": [f"{run['tokens_per_second']:,}" for run in runs],
    }
    kinds = [k for k in runs[0]["after"] if k != "all" and k not in runs[0].get("before", {})]
    for kind in kinds:
        columns[kind.replace("_", " ")] = [f"{run['after'][kind]:.1%}" for run in runs]
    return columns


def table(metrics: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as plain text."""
    columns = {"architecture": [*metrics], **_columns(metrics)}
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def draw(path: Path, metrics: dict[str, dict[str, Any]]) -> None:
    """Plot accuracy against steps, each line connected to its row of a table."""
    set_style()
    figure = plt.figure(figsize=(12.5, 4.8))
    axes = figure.add_axes((0.055, 0.13, 0.4, 0.65))
    _draw_curves(axes, {name: run["accuracy_at_step"] for name, run in metrics.items()})
    _draw_table(figure, axes, metrics)
    title = "Accuracy of each architecture on one budget"
    figure.text(0.02, 0.92, title, fontsize=16, fontweight="bold")
    steps = max(run["steps"] for run in metrics.values())
    subtitle = f"correct answers to test questions about one image, over {steps:,} optimizer steps"
    figure.text(0.02, 0.86, subtitle, fontsize=10.5, color=FAINT)
    save_figure(figure, path)


def _draw_curves(axes: Axes, curves: dict[str, list[list[float]]]) -> None:
    style = {"linewidth": 2, "marker": "o", "markersize": 4, "clip_on": False}
    for name, points in curves.items():
        steps, shares = np.array(points).T
        axes.plot(steps, shares.clip(*AXIS), label=name, color=COLORS.get(name), **style)
    axes.set_xlim(0, max(points[-1][0] for points in curves.values()))
    # Log odds, which separate 98 % from 99 %: twice as many mistakes.
    lowest = min(share for points in curves.values() for _, share in points)
    axes.set_yscale("logit")
    axes.set_ylim(max(AXIS[0], 0.8 * lowest), AXIS[1])
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer step", color=FAINT, fontsize=9.5)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.6)
    axes.tick_params(colors=FAINT, labelsize=9)


def _draw_table(figure: Figure, axes: Axes, metrics: dict[str, dict[str, Any]]) -> None:
    """Draw rows beside the axes, in the order in which the lines end, so that none crosses another."""
    colors = {line.get_label(): line.get_color() for line in axes.get_lines()}
    ends = {
        name: np.clip(run["accuracy_at_step"][-1], (0, AXIS[0]), (np.inf, AXIS[1]))
        for name, run in metrics.items()
    }
    order = sorted(metrics, key=lambda name: -ends[name][1])
    columns = _columns({name: metrics[name] for name in order})
    left, top, width = 0.5, 0.79, 0.36 / len(columns)
    height = min(0.14, 0.66 / len(order))
    right = [0.98 - width * (len(columns) - 1 - index) for index in range(len(columns))]
    for x, (title, cells) in zip(right, columns.items(), strict=True):
        head = title.replace(" ", "\n")
        figure.text(x, top, head, ha="right", va="bottom", fontsize=9.5, color=FAINT, linespacing=1.2)
        for row, cell in enumerate(cells):
            figure.text(x, top - height * (row + 0.6), cell, ha="right", va="center", fontsize=11)
    for row, name in enumerate(order):
        color = colors[name]
        y = top - height * (row + 0.6)
        bold = {"fontsize": 11, "fontweight": "bold", "color": color}
        figure.text(left, y, name.replace("_", " "), va="center", **bold)
        leader = ConnectionPatch(
            ends[name], (left - 0.008, y), axes.transData, figure.transFigure, color=color, linewidth=0.8
        )
        figure.add_artist(leader)


if __name__ == "__main__":
    main()
