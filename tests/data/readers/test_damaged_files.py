"""Files that are damaged, cut off or changed while they are open; nothing is dropped without notice."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import feather, parquet
from sample_records import CAT, DOG, PIXELS, llava, messages, said, write_images, write_lines

from torchfuse.data import read_samples
from torchfuse.errors import DataError

RECORDS = [llava(f"question {index}", f"answer {index}") for index in range(61)]


def write_tar(path, *members):
    """Write members: name and content, or name, type and target of a link."""
    with tarfile.open(path, "w") as tar:
        for name, content, *link in members:
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = content, *link
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path, row_group_size=17, compression="zstd")


def write_arrow(path):
    feather.write_feather(pyarrow.Table.from_pylist(RECORDS), path, chunksize=17)


def write_stream(path):
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)


def write_shard(path):
    write_tar(path, *((f"{i}.json", json.dumps(record).encode()) for i, record in enumerate(RECORDS)))


def errors_of(file, samples=None):
    """The errors of opening a file, and of reading each of its rows, with what each begins with."""
    found = []
    try:
        samples = read_samples(file, format="llava") if samples is None else samples
    except DataError as error:
        return [(str(error), f"{file} ")]
    for index in range(len(samples)):
        try:
            samples[index]
        except DataError as error:
            found.append((str(error), f"{file}, row {index}: "))
    return found


@pytest.mark.parametrize(
    ("write", "is_open"),
    [
        *((write, False) for write in (write_parquet, write_arrow, write_stream, write_shard)),
        *((write, True) for write in (write_parquet, write_arrow, write_shard)),  # others are mapped
    ],
)
def test_damage_is_an_error_of_the_file_or_of_rows(tmp_path, write, is_open):
    generator = np.random.default_rng(len(write.__name__))
    write(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    errors = []
    for number in range(40):
        file = tmp_path / f"{number}"
        file.write_bytes(content)
        samples = read_samples(file) if is_open else None
        damaged = bytearray(content)
        for place in generator.integers(16, len(content), 3):
            damaged[place] ^= int(generator.integers(1, 256))
        file.write_bytes(damaged)
        errors += errors_of(file, samples)
    assert errors
    assert [pair for pair in errors if not pair[0].startswith(pair[1])] == []


def test_only_the_text_that_is_no_utf8_is_refused(tmp_path):
    text = pyarrow.array([b"\xff", b"Q"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(
        pyarrow.table({"question": text, "answers": [["A"]] * 2}), tmp_path / "a.parquet"
    )
    samples = read_samples(tmp_path / "a.parquet", format="vqa")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: .*utf-8"):
        samples[0]
    assert said(samples[1].messages) == [("user", ["Q"]), ("assistant", ["A"])]


def test_a_pattern_and_a_folder_name_the_same_files(tmp_path):
    for name in ("a.ndjson", "b.ndjson"):
        write_lines(tmp_path / name, [messages(name, "A")])
    (tmp_path / "._a.ndjson").write_bytes(b"\0\5\x16\7")  # macOS writes these
    (tmp_path / "folder.ndjson").mkdir()
    for path in (tmp_path / "*.ndjson", tmp_path):
        if path == tmp_path:
            (tmp_path / "folder.ndjson").rmdir()
        assert [sample.prompt[0].text for sample in read_samples(path)] == ["a.ndjson", "b.ndjson"]
    (tmp_path / "c.ndjson").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "*.ndjson", tmp_path):
        with pytest.raises(DataError, match=r"c\.ndjson cannot be read: No such file"):
            read_samples(path)


def test_pipes_and_folders_of_a_file_s_name_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe\.jsonl cannot be read: it is no regular file"):
        read_samples(tmp_path / "pipe.jsonl")
    (tmp_path / "pipe.jsonl").unlink()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl cannot be read: it is no regular file"):
        read_samples(tmp_path)


@pytest.mark.parametrize(
    ("path", "complaint"), [("a" * 5000, "File name too long"), ("a\0.json", "embedded null byte")]
)
def test_paths_that_no_file_can_have(path, complaint):
    with pytest.raises(DataError, match=f"cannot be read: {complaint}"):
        read_samples(path)


def test_tar_members_that_are_links_are_refused(tmp_path):
    question = json.dumps({"question": "Q", "answers": ["A"]}).encode()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        members = [
            ("a.png", PIXELS[CAT]),
            ("a.json", question),
            ("b.png", kind, "a.png"),
            ("b.json", question),
        ]
        samples = read_samples(write_tar(tmp_path / "a.tar", *members))
        assert samples[0].images[0].read() == PIXELS[CAT]
        with pytest.raises(DataError, match=r"a\.tar, row 1: the member b\.png is a link"):
            samples[1]


def test_tar_files_behind_each_other_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar")
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content + bytes(3_000_000))
    assert len(read_samples(tmp_path / "a.tar")) == len(RECORDS)
    (tmp_path / "a.tar").write_bytes(content + content)
    with pytest.raises(DataError, match="data after the archive's end at byte .* or another archive"):
        read_samples(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["a.1.png", "1.png"])
@pytest.mark.parametrize(
    "part",
    [
        lambda name: {"path": name},
        lambda name: {"image_url": {"url": name}},
        lambda name: {"image": name},
    ],
)
def test_parts_of_messages_name_members_of_their_shard(tmp_path, name, part):
    write_images(tmp_path)
    parts = [{"type": "image_url", **part(name)}, {"type": "text", "text": "Q"}]
    record = messages(parts, "A", path="a.0.png")
    members = [
        ("a.0.png", PIXELS[DOG]),
        ("a.1.png", PIXELS[CAT]),
        ("a.json", json.dumps(record).encode()),
    ]
    (sample,) = read_samples(write_tar(tmp_path / "a.tar", *members))
    assert said(sample.messages) == [("user", [PIXELS[CAT], "Q"]), ("assistant", ["A"])]
    assert sample.metadata == {"path": "a.0.png"}
