import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchfuse.errors import CheckpointError
from torchfuse.io.directory import CheckpointDirectory
from torchfuse.io.strict_json import read_json
from torchfuse.io.torch_file import CheckpointFile, open_checkpoint

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a.weight": torch.arange(15.0).reshape(3, 5),
    "b.weight": torch.arange(7, dtype=torch.bfloat16),
    "c.mask": torch.tensor([True, False]),
}


def make(folder: Path, *, shards: bool = False, config: str = '{"model_type": "llama"}') -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    if not shards:
        save_file(TENSORS, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(TENSORS)}
    for name, file in weight_map.items():
        save_file({name: TENSORS[name]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_raw(file: Path, header: str, data: bytes = b"") -> None:
    content = header.encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + data)


def refused(path: Path, *complaints: str) -> None:
    with pytest.raises(CheckpointError) as info:
        CheckpointDirectory(path)
    for complaint in complaints:
        assert complaint in str(info.value), info.value


@pytest.mark.parametrize("shards", [False, True])
def test_a_table_of_names_shapes_dtypes_and_values(tmp_path, shards):
    folder = make(tmp_path / "x", shards=shards)
    save_file({"z": torch.zeros(2)}, folder / "leftover.safetensors")  # no index names it
    with CheckpointDirectory(str(folder)) as directory:
        assert directory.config == {"model_type": "llama"}
        assert directory.path == folder
        assert list(directory) == list(TENSORS)
        assert len(directory) == 3
        for name, tensor in TENSORS.items():
            assert directory[name] == tuple(tensor.shape)
            assert directory.dtype(name) == tensor.dtype
            assert directory.nbytes(name) == tensor.nbytes
            assert torch.equal(directory.read(name), tensor)
        assert repr(directory) == f"CheckpointDirectory('{folder}', 3 tensors, 76 bytes)"
        with pytest.raises(KeyError, match="nothing"):
            directory["nothing"]
        kept = directory.read("a.weight")
    assert torch.equal(kept, TENSORS["a.weight"])  # after the file was closed


@pytest.mark.parametrize(
    "entry",
    [
        *"/etc/passwd ../outside.safetensors sub/x.safetensors sub\\x . ..".split(),
        *["", "model\0.safetensors", None, 3, ["model-0.safetensors"], {"file": "x"}],
    ],
    ids=repr,
)
def test_entries_of_an_index_are_names_of_files_beside_it(tmp_path, entry):
    folder = make(tmp_path / "x", shards=True)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["a.weight"] = entry
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, f"{INDEX} puts a.weight in {entry!r}, which is no file beside it")


def test_all_bad_entries_are_one_error(tmp_path):
    folder = make(tmp_path / "x", shards=True)
    entries = {"a": "../a", "b": "gone-1.safetensors", "c": "gone-2.safetensors"}
    entries |= {f"t{i}": i for i in range(7)}
    (folder / INDEX).write_text(json.dumps({"weight_map": entries}))
    refused(folder, "puts a in '../a'", "puts t6 in 6", "... and 2 more.")
    entries = {name: file for name, file in entries.items() if file != "../a" and name[0] != "t"}
    (folder / INDEX).write_text(json.dumps({"weight_map": entries}))
    refused(folder, "gone-1.safetensors is missing", "gone-2.safetensors is missing")


FILES = ["config.json", INDEX, "model-0.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    folder = make(tmp_path / "x", shards=True)
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)  # opening it would wait for a writer
    elif kind == "directory":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero")
    complaint = "is a link to another directory" if kind == "device" else "is no regular file"
    refused(folder, f"{folder / name} {complaint}")


@pytest.mark.parametrize("name", FILES)
def test_links_stay_in_the_directory(tmp_path, name):
    folder = make(tmp_path / "x", shards=True)
    file, outside = folder / name, tmp_path / "outside"
    file.rename(outside)
    for target in (outside, Path("../outside")):
        file.symlink_to(target)
        refused(folder, f"{file} is a link to another directory")
        file.unlink()
    file.symlink_to(name)
    refused(folder, f"{file} cannot be read: Too many levels of symbolic links")
    file.unlink()
    file.symlink_to("nowhere")
    refused(folder, f"{file} cannot be read: No such file or directory")
    file.unlink()
    outside.rename(folder / "inside")
    file.symlink_to("inside")
    (tmp_path / "link").symlink_to(folder)  # the way to the directory is the caller's own
    assert len(CheckpointDirectory(tmp_path / "link")) == 3


def test_the_cache_of_the_hub_is_read(tmp_path):
    repository = tmp_path / "models--someone--something"
    folder = make(repository / "snapshots" / "0a1b", shards=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{number}")
    with CheckpointDirectory(folder) as directory:
        assert torch.equal(directory.read("a.weight"), TENSORS["a.weight"])
    config, target = folder / "config.json", (folder / "config.json").resolve()
    for elsewhere in (tmp_path / "x", repository / "x", tmp_path / "models--other" / "blobs" / "x"):
        elsewhere.parent.mkdir(parents=True, exist_ok=True)
        elsewhere.write_bytes(target.read_bytes())
        config.unlink()
        config.symlink_to(elsewhere)
        refused(folder, f"{config} is a link to another directory")
    plain = make(tmp_path / "plain" / "snapshots" / "0a1b")  # no repository of a cache
    (plain / "config.json").rename(plain.parent.parent / "config.json")
    (plain / "config.json").symlink_to("../../config.json")
    refused(plain, "is a link to another directory")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 3}}', "the key 'c' is twice in one object"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": -Infinity}', "-Infinity is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        (f'{{"a": 1{"0" * 5000}}}', "is no finite number"),
        ('{"a": ' + "[" * 100_000, "recursion"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "more than 64 levels deep"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\uDFFF": 1}', "surrogates not allowed"),
        ("\ufeff{}", "BOM"),
        ("{}{}", "Extra data"),
        ("", "Expecting value"),
    ],
    ids="twice nested_nan infinity float integer deep depth surrogate surrogate_key bom more empty".split(),
)
def test_json_that_readers_take_differently(tmp_path, text, complaint):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json is no valid JSON: ") as info:
        read_json(file)
    assert complaint in str(info.value)


def test_json_of_other_bytes_and_of_any_size(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"x\.json is no valid JSON: 'utf-8' codec"):
        read_json(file)
    os.truncate(file, 100_000_001)
    with pytest.raises(CheckpointError, match=r"x\.json is no valid JSON: more than 100000000 bytes"):
        read_json(file)
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read: No such file"):
        read_json(tmp_path / "none.json")


def test_json_as_it_should_be(tmp_path):
    file = tmp_path / "x.json"
    given = {"a": 10**30, "b": [1.5e-5, None, True], "c": "\U0001f600\u00e9", "d": {"a": {}}}
    for ascii_only in (True, False):
        file.write_text(json.dumps(given, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(file) == given


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


@pytest.mark.parametrize(
    ("header", "data", "complaints"),
    [
        # refused here
        (f'{{"a":{entry()},"a":{entry()}}}', 8, ["is damaged", "the key 'a' is twice"]),
        (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{entry()}}}', 8, ["the key 'x' is twice"]),
        (f'{{"a":{entry("F4", "[16]")}}}', 8, ["has a in F4"]),
        (f'{{"a":{entry("F6_E2M3", "[8]", "[0,6]")}}}', 6, ["has a in F6_E2M3"]),
        (
            f'{{"a":{entry("F32", "[0,9223372036854775808]", "[0,0]")}}}',
            0,
            ["has a in the impossible shape"],
        ),
        (
            f'{{"a":{entry("F32", "[0,4294967296,4294967296]", "[0,0]")}}}',
            0,
            ["has a in the impossible shape"],
        ),
        # refused by safetensors, on which the table relies
        (f'{{"a":{entry("X", "[2]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry(shape="[3]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry(shape="[-2]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry(shape="[2.0]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry(shape="[4294967296,4294967296]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry(offsets="[8,0]")}}}', 8, ["is damaged"]),
        (f'{{"a":{entry()},"b":{entry(offsets="[4,12]")}}}', 12, ["is damaged"]),
        (f'{{"a":{entry()},"b":{entry(offsets="[12,20]")}}}', 20, ["is damaged"]),
        (f'{{"a":{entry()}}}', 9, ["is damaged"]),
        (f'{{"a":{entry()}}}', 7, ["is damaged"]),
        ('{"a":' * 10_000, 8, ["is damaged"]),
    ],
    ids="twice metadata f4 f6 impossible product unknown shape negative float overflow backwards overlap "
    "gap more less deep".split(),
)
def test_headers_that_lie(tmp_path, header, data, complaints):
    folder = make(tmp_path / "x")
    file = folder / "model.safetensors"
    write_raw(file, header, bytes(data))
    refused(folder, str(file), *complaints)


@pytest.mark.parametrize("length", [0, 7, 10**9, 2**64 - 1])
def test_lengths_of_headers_that_lie(tmp_path, length):
    folder = make(tmp_path / "x")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(folder, f"{file} is damaged")


def test_every_dtype_that_torch_has_is_read(tmp_path):
    folder = make(tmp_path / "x")
    dtypes = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64, torch.int8]
    dtypes += [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.complex64]
    save_file({str(d): torch.ones(3).to(d) for d in dtypes}, folder / "model.safetensors")
    with CheckpointDirectory(folder) as directory:
        for dtype in dtypes:
            assert directory.dtype(str(dtype)) == directory.read(str(dtype)).dtype == dtype
            assert directory.nbytes(str(dtype)) == 3 * dtype.itemsize


def test_a_name_in_two_shards(tmp_path):
    folder = make(tmp_path / "x", shards=True)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('{"a.weight"', '{"a.weight": "model-1.safetensors", "a.weight"')
    )
    refused(folder, f"{INDEX} is no valid JSON: the key 'a.weight' is twice")
    (folder / INDEX).write_text(text)
    both = {name: TENSORS[name] for name in ("a.weight", "b.weight")}
    save_file(both, folder / "model-1.safetensors")
    refused(folder, f"model-1.safetensors and {INDEX} disagree about 1 tensors, such as a.weight")


def test_an_index_beside_one_file(tmp_path):
    folder = make(tmp_path / "x", shards=True)
    save_file(TENSORS, folder / "model.safetensors")
    refused(folder, f"has both model.safetensors and {INDEX}", "remove the one that is out of date")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert set(CheckpointDirectory(folder)) == set(TENSORS)


def test_a_directory_of_pickles_is_refused_with_advice(tmp_path):
    folder = make(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save(TENSORS, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is a pickle, which can run code", "save_pretrained")


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", [CheckpointDirectory, CheckpointFile], ids=lambda kind: kind.__name__)
def test_tensors_are_mapped_not_copied(tmp_path, kind):
    tensors = {"a": torch.ones(8 << 20), "b": torch.ones(8 << 20)}
    if kind is CheckpointDirectory:
        path = make(tmp_path / "x")
        save_file(tensors, path / "model.safetensors")
    else:
        path = tmp_path / "x.pt"
        torch.save(tensors, path)
    del tensors
    with kind(path) as checkpoint:
        checkpoint.read("a")[:1].sum()  # whatever the first use of torch takes
        before = anonymous_memory()
        held = [checkpoint.read(name) for name in checkpoint]
        assert sum(float(tensor.sum()) for tensor in held) == 16 << 20
        assert anonymous_memory() - before < 4 << 20  # of 64 MiB


# Files of torch.save


def save(content, path: Path, **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path, **options)
    return path


def test_a_file_has_the_same_interface(tmp_path):
    shared = torch.arange(11.0)
    content = {
        "x": TENSORS["a.weight"],
        "y": torch.nn.Parameter(shared),
        "z": shared[3:5],
        "e": torch.zeros(0),
    }
    plain = save(content, tmp_path / "consolidated.00.pth")
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    with CheckpointFile(plain) as checkpoint:
        assert checkpoint.config == {"model_type": "other"}
    (tmp_path / "params.json").write_text('{"dim": 5}')
    nested = save({"model": content}, tmp_path / "alone" / "model.pt")
    for path, config in ((plain, {"dim": 5}), (nested, {})):
        with CheckpointFile(str(path)) as checkpoint:
            assert checkpoint.config == config
            assert checkpoint.path == path
            assert list(checkpoint) == ["x", "y", "z", "e"]
            for name, tensor in content.items():
                assert checkpoint[name] == tuple(tensor.shape)
                assert checkpoint.dtype(name) == tensor.dtype
                assert checkpoint.nbytes(name) == tensor.nbytes
                assert torch.equal(checkpoint.read(name), tensor)
                assert not checkpoint.read(name).requires_grad
            assert repr(checkpoint) == f"CheckpointFile('{path}', 4 tensors, 112 bytes)"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"a": torch.ones(1), "n": 3, 5: torch.ones(1)}, "got 'n' (a int), 5 (the name is a int)"),
        ({"a": torch.empty(2, device="meta")}, "'a' (not dense values)"),
        ({"a": {"b": torch.ones(1)}}, "'a' (a dict)"),
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, "contains more than a model: 'epoch'"),
        ({"model": {}}, "must hold tensors by name"),
        (torch.ones(3), "must hold tensors by name, got a Tensor"),
        ([torch.ones(3)], "must hold tensors by name, got a list"),
    ],
    ids="mixed meta nested more empty tensor list".split(),
)
def test_a_file_holds_tensors_and_nothing_else(tmp_path, content, complaint):
    path = save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt") as info:
        CheckpointFile(path)
    assert complaint in str(info.value)


class Hostile:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["value", "model", "whole", "raw", "legacy"])
def test_no_code_of_a_pickle_runs(tmp_path, place):
    sign = tmp_path / "it ran"
    hostile, path = Hostile(sign), tmp_path / "x.pt"
    content = {"value": {"a": hostile}, "model": {"model": {"a": hostile}}}.get(place, hostile)
    if place == "raw":
        path.write_bytes(pickle.dumps(content))
    else:
        save(content, path, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(
        CheckpointError, match=r"x\.pt cannot be read as tensors .* could run code"
    ) as info:
        CheckpointFile(path)
    assert not sign.exists()
    assert "weights_only" not in str(info.value)
    if place == "raw":  # the trap works
        pickle.loads(path.read_bytes())
        assert sign.exists()


def repack(path: Path, edit, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, edit(name, content))


def test_files_that_lie(tmp_path):
    path = save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "x.pt")
    whole = path.read_bytes()

    def refused_after(edit, complaint, *compression):
        path.write_bytes(whole)
        repack(path, edit, *compression)
        with pytest.raises(CheckpointError, match=rf"x\.pt {complaint}"):
            CheckpointFile(path)

    def numbers(old, new):
        return lambda name, content: content.replace(old, new) if name.endswith(".pkl") else content

    repack(path, lambda name, content: content)  # by itself it does no harm
    assert torch.equal(CheckpointFile(path).read("b"), torch.ones(2))
    sizes = "is damaged: its tensors do not fill"
    refused_after(numbers(b"K\x03", b"K\x7f"), sizes)  # includes the bytes behind it
    refused_after(numbers(b"K\x03", b"J\xff\xff\xff\x0f"), "cannot be read as tensors")
    refused_after(lambda name, content: content[:4] if name.endswith("/0") else content, sizes)
    refused_after(lambda name, content: content, r".*it is compressed", zipfile.ZIP_DEFLATED)
    refused_after(lambda name, content: content + b"." if name.endswith("/1") else content, sizes)
    for content in (b"", b"PK", whole[:-30], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.pt cannot be read as tensors \(.*zip file"):
            CheckpointFile(path)


def test_files_are_regular_and_stay_in_their_directory(tmp_path):
    outside = save({"a": torch.ones(3)}, tmp_path / "outside.pt")
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "link.pt").symlink_to(outside)
    os.mkfifo(folder / "fifo.pt")
    (folder / "directory.pt").mkdir()
    for name, complaint in {
        "link.pt": "link to another directory",
        "fifo.pt": "is no regular file",
        "directory.pt": "is no regular file",
        "none.pt": "cannot be read: No such file",
        "model.safetensors": r"must be a file that ends in one of \.bin, \.pt, \.pth",
    }.items():
        with pytest.raises(CheckpointError, match=complaint):
            CheckpointFile(folder / name)
    config = save({"a": torch.ones(3)}, folder / "x.pt").with_name("params.json")
    config.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"params\.json is a link to another directory"):
        CheckpointFile(folder / "x.pt")


def test_open_checkpoint_chooses_the_reader_by_the_path(tmp_path):
    folder = make(tmp_path / "x.pt")
    file = save({"a": torch.ones(3)}, tmp_path / "y.pt")
    assert repr(open_checkpoint(str(folder))).startswith("CheckpointDirectory(")
    assert repr(open_checkpoint(file)).startswith("CheckpointFile(")
    with pytest.raises(CheckpointError, match="none is not a directory; give a Hugging Face checkpoint"):
        open_checkpoint(tmp_path / "none")
