"""The command ``torchfuse`` and its subcommands."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

import torchfuse
from torchfuse.errors import CheckpointError, ConfigError, DataError

__all__ = ["main"]


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
    describe = commands.add_parser(
        "describe",
        help="print the parts of a model: tensors, parameters, what trains, dtype",
        description="Print the parts of a model: tensors, parameters, what trains. No weight is read.",
    )
    describe.add_argument(
        "path",
        help="a recipe's configuration (.yaml), the output directory of a finetuning run, an artifact "
        "of save_fusion, or the directory of a checkpoint",
    )
    check = commands.add_parser(
        "check-data",
        help="read and transform every row of files of samples; all errors in one report",
        description="Read and transform every row of files of samples, and open every image, on all "
        "cores. Prints all errors by file and row, lengths, sizes of images and what packing would "
        "save. The exit code is 1 if a row cannot be used.",
    )
    check.add_argument(
        "files", nargs="*", metavar="FILE", help="files of samples; none: those of the configuration"
    )
    check.add_argument("--config", required=True, help="a configuration of the finetune recipe (.yaml)")
    check.add_argument("--format", default="auto", help="format of FILEs; by default it is detected")
    check.add_argument("--image-root", help="where relative paths of images in FILEs begin")
    check.add_argument("--workers", type=int, help="processes; by default one for each core")
    given = parser.parse_args(arguments)
    try:
        if given.command == "check-data":
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
        from torchfuse.cli.describe import describe as run  # takes a second to import

        print(run(given.path))
    except (ConfigError, DataError, CheckpointError) as error:
        if os.environ.get("TORCHFUSE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
