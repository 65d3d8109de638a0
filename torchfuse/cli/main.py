"""The command ``torchfuse`` and its subcommands."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torchfuse
from torchfuse.errors import CheckpointError, ConfigError, DataError

__all__ = ["main"]

# Subcommands are imported where they run: most take a second to import.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``torchfuse``.

    Args:
        arguments: the arguments of the command line. None: those of the process.

    Returns:
        The exit code: 0, or 1 if ``check-data`` found rows that cannot be used, or after an error of
        configuration, data or checkpoint, which is printed as one sentence; with
        ``TORCHFUSE_TRACEBACK`` set in the environment it is raised.
    """
    parser = ArgumentParser(prog="torchfuse", description=torchfuse.__doc__)
    parser.add_argument("--version", action="version", version=f"torchfuse {torchfuse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_ls, _add_cp, _add_describe, _add_estimate, _add_check_data, _add_export):
        add(commands)
    given = parser.parse_args(arguments)
    try:
        return int(given.run(given))
    except (ConfigError, DataError, CheckpointError) as error:
        if os.environ.get("TORCHFUSE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _add_ls(commands: Any) -> None:
    about = "list the installed configurations, which --config takes by name"
    parser = commands.add_parser("ls", help=about, description=f"{about.capitalize()}.")
    parser.set_defaults(run=_ls)


def _ls(given: Namespace) -> int:
    from torchfuse.training.config_files import config_names, summary_of

    names = config_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {summary_of(name)}")
    return 0


def _add_cp(commands: Any) -> None:
    about = "copy an installed configuration, to be changed"
    parser = commands.add_parser("cp", help=about, description=f"{about.capitalize()}.")
    parser.add_argument("name", help="such as llava/stage1; torchfuse ls prints all")
    parser.add_argument("destination", help="the file to write, or a folder")
    parser.set_defaults(run=_cp)


def _cp(given: Namespace) -> int:
    from torchfuse.training.config_files import copy_config

    print(f"wrote {copy_config(given.name, given.destination)}")
    return 0


def _add_describe(commands: Any) -> None:
    parser = commands.add_parser(
        "describe",
        help="print the parts of a model: tensors, parameters, what trains, dtype",
        description="Print the parts of a model: tensors, parameters, what trains. No weight is read.",
    )
    parser.add_argument(
        "path",
        help="a recipe's configuration (a name or a .yaml), the output directory of a finetuning run, "
        "an artifact of save_fusion, or the directory of a checkpoint",
    )
    parser.set_defaults(run=_describe)


def _describe(given: Namespace) -> int:
    from torchfuse.cli.describe import describe

    print(describe(given.path))
    return 0


def _add_estimate(commands: Any) -> None:
    parser = commands.add_parser(
        "estimate",
        help="estimate the memory and the speed of a training, without weights",
        description="Simulate a step of a training without weights. Prints parameters, memory by part "
        "and phase, the speed that named GPUs cannot exceed, and what changes would save. Directories "
        "need not exist if they are named after published checkpoints whose sizes are known.",
    )
    parser.add_argument("config", help="a configuration of the finetune recipe (a name or a .yaml)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of it")
    parser.add_argument("--devices", type=int, default=1, help="over which FSDP2 shards the model")
    parser.add_argument("--seq-len", type=int, help="positions of a row; by default data.max_seq_len")
    parser.add_argument(
        "--images",
        type=int,
        help="images of a row; by default 1, in packs as many as fit with 256 tokens of text each",
    )
    parser.add_argument(
        "--supervised", type=float, default=1.0, help="share of the positions that are supervised"
    )
    parser.set_defaults(run=_estimate)


def _estimate(given: Namespace) -> int:
    from torchfuse.cli.estimate import print_estimate

    options = {"seq_len": given.seq_len, "images": given.images, "supervised": given.supervised}
    print_estimate(given.config, given.overrides, devices=given.devices, **options)
    return 0


def _add_check_data(commands: Any) -> None:
    parser = commands.add_parser(
        "check-data",
        help="read and transform every row of files of samples; all errors in one report",
        description="Read and transform every row of files of samples, and open every image, on all "
        "cores. Prints all errors by file and row, lengths, sizes of images and what packing would "
        "save. The exit code is 1 if a row cannot be used.",
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="files of samples; none: those of the configuration"
    )
    parser.add_argument(
        "--config", required=True, help="a configuration of the finetune recipe (a name or a .yaml)"
    )
    parser.add_argument("--format", default="auto", help="format of FILEs; by default it is detected")
    parser.add_argument("--image-root", help="where relative paths of images in FILEs begin")
    parser.add_argument("--workers", type=int, help="processes; by default one for each core")
    parser.set_defaults(run=_check_data)


def _check_data(given: Namespace) -> int:
    from torchfuse.cli.check_data import check_data

    report = check_data(
        given.files,
        given.config,
        format=given.format,
        image_root=given.image_root,
        workers=given.workers,
    )
    encoding = sys.stdout.encoding or "utf-8"  # not all of them have every character of a path
    print(str(report).encode(encoding, "backslashreplace").decode(encoding))
    return 0 if report.ok else 1


def _add_export(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write a finetuned model as a directory that another library loads",
        description="Write the model of a finetuning run as a directory in the format of another "
        "library, LoRA merged. The directory appears complete or not at all.",
    )
    parser.add_argument(
        "path", help="the output directory of a finetuning run, or a whole model's directory"
    )
    parser.add_argument("destination", help="the directory to write")
    parser.add_argument(
        "--format",
        required=True,
        choices=("llava", "mllama", "torchfuse", "torchtune"),
        help="llava and mllama are loaded by transformers, torchtune by its checkpointers",
    )
    parser.add_argument("--dtype", help="fp32 or bf16; by default the one that it was trained in")
    parser.set_defaults(run=_export)


def _export(given: Namespace) -> int:
    from torchfuse.cli.export import export_path

    export_path(given.path, given.destination, format=given.format, dtype=given.dtype)
    print(f"wrote {given.destination}")
    return 0
