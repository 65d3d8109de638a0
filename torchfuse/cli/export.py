"""``torchfuse export``: a finetuned model as a directory for another library."""

from __future__ import annotations

from pathlib import Path

from torchfuse.checkpoint.export import export
from torchfuse.checkpoint.load import from_pretrained
from torchfuse.errors import CheckpointError
from torchfuse.tasks.runs import load_run
from torchfuse.training.config import read_sections
from torchfuse.training.device import device_and_dtype

__all__ = ["export_path"]

_RUN = "config.yaml"  # what a finetuning run writes into its output directory


def export_path(path: str | Path, destination: str | Path, *, format: str, dtype: str | None) -> None:
    """Write the model of a finetuning run, LoRA merged, or of a directory in a format.

    Args:
        path: the ``output_dir`` of a finetuning run, or a directory that ``from_pretrained`` reads.
        destination: the directory to write.
        format: see ``torchfuse.export``.
        dtype: of the weights, ``"fp32"`` or ``"bf16"``. None: that of the run or of the directory.

    Raises:
        ConfigError: for an unknown format, or if the run's configuration is wrong.
        CheckpointError: if the path is neither, or a checkpoint is wrong; for a model that the format
            cannot hold.
    """
    path = Path(path)
    if (path / _RUN).is_file():
        hint = "every finetuning run writes one"
        dtype = dtype or read_sections(path / _RUN, hint, "dtype").get("dtype", "fp32")
        model, _ = load_run(path, device="cpu", dtype=dtype)
    elif path.is_dir():
        model = from_pretrained(path, dtype=None if dtype is None else device_and_dtype("cpu", dtype)[1])
    else:
        raise CheckpointError(f"{path} is not a directory: give a finetuning run's output_dir.")
    export(model, destination, format=format)
