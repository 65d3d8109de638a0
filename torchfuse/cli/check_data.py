"""``torchfuse check-data``: every row of files of samples, as a configuration would train on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from torchfuse.components import build
from torchfuse.data.checking import Report, check_samples
from torchfuse.data.readers import Samples, read_mixture, read_samples
from torchfuse.errors import ConfigError
from torchfuse.training.config import read_config

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
        files: the files. None: those of the configuration's ``data.train`` and ``data.test``.
        config: a YAML of the finetune recipe.
        format: of the files, see ``read_samples``.
        image_root: of the files, see ``read_samples``.
        workers: processes, see ``check_samples``.

    Raises:
        ConfigError: if the configuration has no transform, or it cannot be built; if there is no file.
        DataError: if a file cannot be opened.
    """
    given: Any = OmegaConf.to_container(read_config(config, "a configuration has a transform section"))
    if not given.get("transform"):
        raise ConfigError(f"{config} has no section transform.")
    samples = [read_samples(file, format=format, image_root=image_root) for file in files]
    samples = samples or _configured(given.get("data") or {}, config)
    sys.path.append(os.getcwd())  # components of the user's own, as in recipes
    transform: Any = build(given["transform"], what=f"{config}, transform")
    return check_samples(samples, transform=transform, workers=workers)


def _configured(data: Any, config: str | Path) -> list[Samples]:
    sets = [
        read_mixture(data[name], what=f"{config}, data.{name}").samples
        for name in ("train", "test")
        if data.get(name)
    ]
    if not sets:
        raise ConfigError(f"Name files to check, or give {config} a key data.train.")
    return sets
