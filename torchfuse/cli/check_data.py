"""``torchfuse check-data``: every row of files of samples, as a configuration would train on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchfuse.data.checking import Report, check_samples
from torchfuse.data.readers import Samples, read_mixture, read_samples
from torchfuse.errors import ConfigError
from torchfuse.tasks.transforms import read_transform
from torchfuse.training.config import read_sections
from torchfuse.training.estimation.meta_model import model_on_meta

__all__ = ["check_data"]


def check_data(
    files: Sequence[str | Path],
    config: str | Path,
    *,
    format: str = "auto",
    image_root: str | Path | None = None,
    workers: int | None = None,
) -> Report:
    """Check files of samples with the transform of a configuration.

    Args:
        files: the files; without any, those of the configuration's ``data.train`` and ``data.test``.
        config: a YAML of the finetune recipe.
        format: of the files, see ``read_samples``.
        image_root: of the files, see ``read_samples``.
        workers: processes, see ``check_samples``.

    Raises:
        ConfigError: if the transform or the model of the configuration cannot be built, or no file is
            named.
        CheckpointError: if a directory that the configuration names is wrong.
        DataError: if a file cannot be opened.
    """
    file = Path(config)
    names = ("pretrained", "model", "data", "transform")
    given = read_sections(file, "check-data needs the YAML of a training", *names)
    for name, section in given.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{file}: {name} must be a section of keys with values, got {section!r}.")
    samples = [read_samples(path, format=format, image_root=image_root) for path in files]
    samples = samples or _configured(given.get("data") or {}, file)
    sys.path.append(os.getcwd())  # components of the user's own, as in recipes
    make = read_transform(given, where=f"{file}, ")
    model = nn.Module() if given.get("transform") else model_on_meta(given, file)
    return check_samples(samples, transform=make(model), workers=workers)


def _configured(data: Any, config: Path) -> list[Samples]:
    sets = [
        read_mixture(data[name], what=f"{config}, data.{name}").samples
        for name in ("train", "test")
        if data.get(name)
    ]
    if not sets:
        raise ConfigError(f"Name files to check, or give {config} a key data.train.")
    return sets
