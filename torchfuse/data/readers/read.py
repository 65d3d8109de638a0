"""Samples of files of any format."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from torchfuse.data.readers.arrow_rows import ArrowFileRows, ArrowStreamRows, ParquetRows
from torchfuse.data.readers.formats import FORMATS, matching_formats
from torchfuse.data.readers.json_rows import LINES, JsonRows
from torchfuse.data.readers.lazy_samples import Rows, Samples, Table
from torchfuse.data.readers.tar_rows import TarRows
from torchfuse.errors import ConfigError, DataError
from torchfuse.io.strict_json import read_json

__all__ = ["read_samples"]

_SUFFIXES: Final = (".parquet", ".arrow", ".tar", *LINES, ".json")
_COMPRESSED: Final = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
_TRIED: Final = 1000  # rows in which the format is looked for, where the first ones cannot be read


def read_samples(
    path: str | Path, *, format: str = "auto", image_root: str | Path | None = None
) -> Samples:
    r"""Open files of samples, without reading more than is needed to find the rows.

    Read are JSON arrays and JSON lines, Parquet and Arrow files, folders that ``datasets`` saved, and
    tar shards of webdataset or Energon. The formats of a record:

    - ``"llava"``: ``conversations`` of LLaVA and ShareGPT
    - ``"messages"``: ``messages``, or ``prompt`` and ``completion``, of OpenAI, TRL, ms-swift and
      LLaMA-Factory
    - ``"texts"``: ``texts`` of The Cauldron and FineVision
    - ``"question"``: ``question``, ``answer``, ``images``, ``kind``
    - ``"vqa"``: ``question`` or ``context`` with ``answers``
    - ``"caption"``: ``caption``, as a tar shard's ``.txt``

    Images are beside the conversation (``image``, ``images``) or in it; the same is true of ``video``
    and ``audio``. Nothing is downloaded, and no image is opened.

    Args:
        path: a file, a folder of files of one kind, or a pattern with ``*``.
        format: one of the names above; ``"auto"``: by the fields of each file's first record. With a
            name, fields of other formats are metadata.
        image_root: where relative paths of media begin; None: at their file's folder.

    Raises:
        DataError: if there is no file, it cannot be read, or its format is unknown. A row that cannot be
            used is an error when it is indexed, with file and row.
        ConfigError: if ``format`` is unknown, or ``pyarrow`` is needed and not installed.

    Examples:
        >>> import json, tempfile
        >>> question = {"from": "human", "value": "<image>\nWhich animal?"}
        >>> turns = [question, {"from": "gpt", "value": "A cat."}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "train.json")
        ...     _ = file.write_text(json.dumps([{"image": "cat.jpg", "conversations": turns}]))
        ...     samples = read_samples(file, image_root="images")
        ...     len(samples), samples[0].answer, str(samples[0].images[0])
        (1, 'A cat.', 'images/cat.jpg')
    """
    if format != "auto" and format not in FORMATS:
        raise ConfigError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}.")
    try:
        files = _files(Path(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    tables = []
    for file in files:
        if not len(rows := _open(file)):
            continue
        root = Path(image_root) if image_root is not None else file.parent
        name = _detect(rows) if format == "auto" else format
        tables.append(Table(rows, name, root, is_detected=format == "auto"))
    if not tables:
        raise DataError(f"{path} holds no row.")
    return Samples(tables)


def _files(path: Path) -> list[Path]:
    """Return the files of a path: itself, those of a folder, or those that match a pattern."""
    if path.is_dir():
        return _folder(path)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    names = sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in names if not os.path.isdir(name)]  # broken links are errors
    if not files:
        raise DataError(f"No file matches {path}.")
    return files


def _folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits")
        names = ", ".join(str(path / split) for split in splits) if isinstance(splits, list) else "one"
        raise DataError(f"{path} holds several data sets; give the folder of one of them: {names}.")
    if (path / "state.json").is_file():  # of datasets; the order of its files is in there
        files = read_json(path / "state.json").get("_data_files")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise DataError(f"{path / 'state.json'} does not list the files of the data set.")
        return [path / Path(str(file.get("filename"))).name for file in files]
    files = sorted(file for file in path.iterdir() if file.name[0] != ".")
    by_suffix = {kind: [file for file in files if file.name.endswith(kind)] for kind in _SUFFIXES}
    kinds = [kind for kind in _SUFFIXES if by_suffix[kind]]
    if not kinds:
        raise DataError(f"{path} holds no file that ends in {', '.join(_SUFFIXES)}.")
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds files of several kinds ({', '.join(kinds)}); give a pattern, such as "
            f"{path}/*{kinds[0]}."
        )
    return by_suffix[kinds[0]]


def _open(path: Path) -> Rows:
    """Open the rows of a file by what its first bytes are."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} cannot be read: it is no regular file.")  # a pipe would block
    try:
        with path.open("rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}.") from error
    if head.startswith(b"PAR1"):
        return ParquetRows(path)
    if head.startswith(b"ARROW1"):
        return ArrowFileRows(path)
    if head.startswith(b"\xff\xff\xff\xff"):
        return ArrowStreamRows(path)
    if head[257:262] == b"ustar":
        return TarRows(path)
    if head.startswith(_COMPRESSED):
        raise DataError(f"{path} is compressed; unpack it first.")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first not in (b"[", b"{", b"") and path.suffix not in LINES:
        raise DataError(
            f"{path} is no file of samples; it must be a JSON array, a JSON object a line, Parquet, "
            "Arrow or tar."
        )
    return JsonRows(path)


def _detect(rows: Rows) -> str:
    """Return the name of the format of the first record that can be read and has one."""
    fields: list[str] | None = None
    first_error: str | None = None
    for index in islice(range(len(rows)), _TRIED):
        try:
            record: Any = rows[index]
        except (ValueError, RecursionError) as error:
            first_error = first_error or f"{rows.label(index)}: {error}"
            continue
        if isinstance(record, Mapping):
            found = matching_formats(record)
            if len(found) == 1:
                return found[0]
            fields = [*record] if fields is None else fields
    known = "; ".join(
        f"{name}: {' or '.join(' + '.join(sorted(fields)) for fields in form.fields)}"
        for name, form in FORMATS.items()
    )
    if fields is None:
        raise DataError(f"{rows.path} has no record that can be read ({first_error or 'no objects'}).")
    raise DataError(
        f"{rows.path} has records of no known format (fields of the first: "
        f"{', '.join(map(str, fields)) or 'none'}). The formats are {known}. Name one with format=."
    )
