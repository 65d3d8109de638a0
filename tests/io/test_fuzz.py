"""Damaged directories: either their tensors are loaded, or one error names what is wrong.

What should have been loaded is read by an independent parser in this file.
"""

import json
import os
import random
import shutil
import signal
import stat
import struct
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch
from hf import fused_model, llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import same_state, state

from torchfuse import load_pretrained
from torchfuse.io import directory

SOURCE_SIZES = {
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 7,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
SIZES = {
    "vocab_size": 11,
    "embed_dim": 12,
    "intermediate_dim": 7,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
}
HEAD_DIM = 4
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Directories in memory: a name, and the bytes of a file or what is there instead of one.

LINK, FIFO, FOLDER = "link", "fifo", "folder"


def lay_out(files, folder):
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == FIFO:
            os.mkfifo(path)
        elif content == FOLDER:
            path.mkdir()
        else:
            path.symlink_to(content[1])


def content_of(files, name):
    """Bytes of a file, through links inside; a KeyError or RecursionError if there are none."""
    content = files[name]
    if isinstance(content, tuple):
        return content_of(files, content[1])
    if not isinstance(content, bytes):
        raise KeyError(name)
    return content


# The format of safetensors, as it is documented.


def unpack(content):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length], object_pairs_hook=once)
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: (e["dtype"], e["shape"], data[e["data_offsets"][0] : e["data_offsets"][1]])
        for name, e in header.items()
    }


def once(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def pack(tensors):
    header, data = {}, b""
    for name, (dtype, shape, values) in tensors.items():
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += values
    return with_header(json.dumps(header).encode(), data)


def with_header(header, data):
    return struct.pack("<Q", len(header)) + header + data


def header_and_data(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def to_tensor(entry):
    dtype, shape, values = entry
    if not values:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(values), dtype=DTYPES[dtype]).reshape(shape)


# What a directory contains.


def read_all(files):
    """Every tensor of a directory."""
    if INDEX not in files:
        return {n: to_tensor(e) for n, e in unpack(content_of(files, "model.safetensors")).items()}
    weight_map = json.loads(content_of(files, INDEX), object_pairs_hook=once)["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in unpack(content_of(files, file)).items():
            assert weight_map[name] == file
            found[name] = to_tensor(entry)
    assert set(found) == set(weight_map)
    return found


def source_name(name):
    """The name in the directory of a tensor of the decoder."""
    top = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in top:
        return top[name]
    _, number, rest = name.split(".", 2)
    inner = {
        "sa_norm.scale": "input_layernorm",
        "mlp_norm.scale": "post_attention_layernorm",
        "attn.q_proj.weight": "self_attn.q_proj",
        "attn.k_proj.weight": "self_attn.k_proj",
        "attn.v_proj.weight": "self_attn.v_proj",
        "attn.output_proj.weight": "self_attn.o_proj",
        "mlp.w1.weight": "mlp.gate_proj",
        "mlp.w2.weight": "mlp.down_proj",
        "mlp.w3.weight": "mlp.up_proj",
    }[rest]
    return f"model.layers.{number}.{inner}.weight"


def in_pairs(tensor):
    """Rows of each head from one half after the other to pairs."""
    half = HEAD_DIM // 2
    heads = tensor.shape[0] // HEAD_DIM
    rows = [h * HEAD_DIM + p * half + i for h in range(heads) for i in range(half) for p in range(2)]
    return tensor[rows]


def expected_of(files, names):
    stored = read_all(files)
    expected = {}
    for name in names:
        tensor = stored.pop(source_name(name), None)
        if tensor is None:
            tensor = stored.pop(source_name(name).removeprefix("model."))
        assert not tensor.is_complex(), f"the imaginary part of {name} is lost"
        tensor = tensor.to(torch.float32)
        expected[name] = in_pairs(tensor) if ".q_proj" in name or ".k_proj" in name else tensor
    left = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    assert not left, f"{left} were ignored"
    return expected


def check_settings(config):
    """The settings that no shape depends on must be those of the model."""
    rope = {}  # later sections take precedence, and null counts as missing
    for section in (
        {"rope_theta": config.get("rope_theta")},
        config.get("rope_scaling") or {},
        config.get("rope_parameters") or {},
    ):
        rope |= {key: value for key, value in section.items() if value is not None}
    assert config["model_type"] == "llama"
    assert config["num_attention_heads"] == 3
    assert config["num_key_value_heads"] == 1
    assert config["rms_norm_eps"] == 1e-5
    assert config.get("hidden_act") in (None, "silu")
    assert config.get("head_dim") in (None, HEAD_DIM)
    assert not config.get("attention_bias") and not config.get("mlp_bias")
    assert rope.pop("rope_theta", 10_000.0) == 10_000.0
    assert rope.pop("rope_type", "default") == "default"
    assert not rope


# Damages. Each changes the files and returns words of which an error may name one.

# Errors at files that an earlier damage has made unreadable: they are not damaged further.
UNUSABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
)


def weights(draw, files):
    names = [n for n, c in files.items() if n.endswith(".safetensors") and isinstance(c, bytes)]
    return draw(st.sampled_from(sorted(names))) if names else None


def some_key(draw, tensors):
    return draw(st.sampled_from(sorted(tensors)))


def raw(change):
    """A damage to the bytes of one file of weights."""

    def damage(draw, files):
        file = weights(draw, files)
        if file is None:
            return set()
        files[file] = change(draw, files[file])
        return {file} | ALL_NAMES

    return damage


def cut(draw, content):
    return content[: draw(st.integers(0, max(len(content) - 1, 0)))]


def grow(draw, content):
    return content + bytes(draw(st.integers(1, 9)))


def flip(draw, content):
    if not content:
        return b"\0"
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    last = len(content) - 1
    at = draw(st.one_of(st.integers(0, min(length + 7, last)), st.integers(0, last)))
    return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]


def other_length(draw, content):
    length = len(content)
    lengths = [0, 1, 7, length, length - 8, length + 1, 100_000_001, 2**31, 2**63, 2**64 - 1]
    return struct.pack("<Q", draw(st.sampled_from(lengths))) + content[8:]


def header(change):
    """A damage to the header that leaves the values as they are."""

    def damage(draw, files):
        file = weights(draw, files)
        try:
            entries, data = header_and_data(files[file])
            key = some_key(draw, [name for name in entries if name != "__metadata__"])
            text = change(draw, entries, key)
        except UNUSABLE:
            return set()
        files[file] = with_header(text.encode("utf-8", "surrogatepass"), data)
        return {file, key, *target_names(key)}

    return damage


def other_shape(draw, entries, key):
    shape = draw(
        st.one_of(
            st.lists(st.integers(-1, 13), max_size=3),
            st.sampled_from([None, "x", [2**63], [2**32, 2**32], [1.5], [[1]], [True], [0, 2**62]]),
        )
    )
    entries[key]["shape"] = shape
    return json.dumps(entries)


def other_dtype(draw, entries, key):
    entries[key]["dtype"] = draw(st.sampled_from([*DTYPES, "F4", "F6_E2M3", "U64", "X", "f32", None, 3]))
    return json.dumps(entries)


def other_view(draw, entries, key):
    """The same bytes in another dtype and the shape that goes with it."""
    dtype = draw(st.sampled_from([*sorted(DTYPES), "F4"]))
    bits = 4 if dtype == "F4" else 8 * DTYPES[dtype].itemsize
    shape = list(entries[key]["shape"])
    shape[-1] = shape[-1] * 32 // bits
    entries[key] |= {"dtype": dtype, "shape": shape}
    return json.dumps(entries)


def other_offsets(draw, entries, key):
    offsets = entries[key]["data_offsets"]
    offsets[draw(st.integers(0, 1))] += draw(st.sampled_from([-4, -1, 1, 4, 2**40]))
    return json.dumps(entries)


def offsets_of_another(draw, entries, key):
    other = some_key(draw, [name for name in entries if name != "__metadata__"])
    entries[key]["data_offsets"] = entries[other]["data_offsets"]
    return json.dumps(entries)


def twice(draw, entries, key):
    same = json.dumps({key: entries[key]})[1:-1]
    return json.dumps(entries)[:-1] + f", {same}}}"


def nested(draw, entries, key):
    depth = draw(st.sampled_from([70, 5_000]))
    return json.dumps(entries)[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"


def half_character(draw, entries, key):
    return json.dumps(entries).replace(json.dumps(key), '"\\ud800"')


def tensors(change):
    """A damage to the tensors after which header and values agree."""

    def damage(draw, files):
        file = weights(draw, files)
        try:
            found = unpack(files[file])
            key = some_key(draw, found)
            named = change(draw, found, key)
            files[file] = pack(found)
        except UNUSABLE:
            return set()
        return {file, key, *named, *target_names(key)}

    return damage


def drop(draw, found, key):
    del found[key]
    return []


def add(draw, found, key):
    names = ["model.layers.9.self_attn.q_proj.weight", "lm_head.bias", "x", "", "a\0b", "norm.weight"]
    names += ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.01.input_layernorm.weight"]
    name = draw(st.sampled_from(names))
    found[name] = found[key]
    return [f"unexpected: {name}"]


def rename(draw, found, key):
    new = draw(st.sampled_from(["x", key + "s", key.removeprefix("model."), key.upper(), *SOURCE_NAMES]))
    replaced = new if new in found else key
    found[new] = found.pop(key)
    return [new, replaced, *target_names(new), *target_names(replaced)]


def exchange_values(draw, found, key):
    other = some_key(draw, found)
    found[key], found[other] = found[other], found[key]
    return [other]


def reshape(draw, found, key):
    dtype, shape, values = found[key]
    numel = torch.Size(shape).numel()
    shapes = [[numel], [1, *shape], shape[::-1], [*shape, 1], [numel // 2, 2]]
    found[key] = (
        dtype,
        draw(st.sampled_from([s for s in shapes if torch.Size(s).numel() == numel])),
        values,
    )
    return []


def resize(draw, found, key):
    dtype, shape, _ = found[key]
    shape = [*shape[:-1], draw(st.sampled_from([0, 1, shape[-1] + 1, 2 * shape[-1]]))]
    values = bytes(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
    found[key] = (dtype, shape, values)
    return []


def real_of(tensor):
    return (tensor.real if tensor.is_complex() else tensor).to(torch.float32)


def convert(draw, found, key):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    tensor = real_of(to_tensor(found[key])).to(DTYPES[dtype])
    values = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    found[key] = (dtype, found[key][1], values)
    return []


def convert_all(draw, found, key):
    dtype = draw(st.sampled_from(["F64", "BF16", "F16"]))
    for name in found:
        tensor = real_of(to_tensor(found[name])).to(DTYPES[dtype])
        values = tensor.flatten().view(torch.uint8).numpy().tobytes()
        found[name] = (dtype, found[name][1], values)
    return []


def special(draw, files):
    """A link, a pipe, a folder or nothing in place of a file."""
    if not files:
        return set()
    name = draw(st.sampled_from(sorted(files)))
    instead = draw(st.sampled_from(["gone", FIFO, FOLDER, "inside", *OUTSIDE]))
    content = files.pop(name)
    if instead == "inside":
        files["elsewhere"] = content
        files[name] = (LINK, "elsewhere")
    elif instead in OUTSIDE:
        target = instead if instead.startswith("/") else f"../outside/{name}"
        files[name] = (LINK, name if instead == "itself" else target)
    elif instead != "gone":
        files[name] = instead
    return {name, "model.safetensors"}


OUTSIDE = ["outside", "itself", "/dev/zero", "/proc/self/environ"]


def hostile_index(draw, files):
    if not isinstance(files.get(INDEX, b""), bytes):
        return set()
    index = {"weight_map": dict.fromkeys(SOURCE_NAMES, "model.safetensors")}
    try:
        index = json.loads(files.get(INDEX, json.dumps(index)))
        weight_map = dict(index["weight_map"])
        key = some_key(draw, weight_map)
        index["weight_map"] = weight_map
    except UNUSABLE:
        return set()
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    bad = [f"../outside/{INDEX}", "../outside/model.safetensors", "/dev/zero", "..", ".", "", "a\0b"]
    bad += ["sub/model.safetensors", "config.json", INDEX, "x" * 300, None, 3, True, [], {}, ["x"]]
    kind = draw(st.sampled_from("entry drop add map no_map twice all".split()))
    entry = draw(st.sampled_from([*bad, *shards]))
    if kind in ("entry", "add"):
        key = key if kind == "entry" else draw(st.sampled_from(["x", "", "norm.weight"]))
        weight_map[key] = entry
    elif kind == "drop":
        del weight_map[key]
    elif kind == "map":
        index["weight_map"] = draw(st.sampled_from([None, [], {}, "x", 3, [key]]))
    elif kind == "no_map":
        del index["weight_map"]
    elif kind == "all":
        index["weight_map"] = dict.fromkeys(weight_map, entry)
    text = json.dumps(index)
    if kind == "twice":
        text = text.replace(json.dumps(key), json.dumps(key) + ': "x", ' + json.dumps(key), 1)
    files[INDEX] = text.encode()
    named = {entry} if isinstance(entry, str) and len(entry) > 2 else set()
    return {INDEX, key, *target_names(key), *named, "is incomplete", "has both"}


def shards(draw, files):
    """Shards that are missing, exchanged or doubled."""
    one, other = weights(draw, files), weights(draw, files)
    if one is None:
        return set()
    kind = draw(st.sampled_from(["gone", "exchanged", "doubled", "one more"]))
    if kind == "gone":
        del files[one]
    elif kind == "exchanged":
        files[one], files[other] = files[other], files[one]
    elif kind == "doubled":
        files[one] = files[other]
    else:
        files["model-9.safetensors"] = files[other]
    return {one, other, INDEX, "model.safetensors"}


def text_of_json(draw, files):
    name = draw(st.sampled_from(["config.json", INDEX]))
    content = files.get(name)
    if not isinstance(content, bytes) or not content:
        return set()
    deep = b'{"x": ' + b"[" * 50_000
    kinds = [cut, flip, b"[]", b"null", b'"x"', b"", deep, b"{}{}", b"\xff\xfe{}", b'{"a": NaN}']
    kind = draw(st.sampled_from(kinds))
    files[name] = kind if isinstance(kind, bytes) else kind(draw, content)
    return {name, *ALL_NAMES, "is incomplete"}


JUNK = [None, "", "x", "12", -1, 0, 1, 3, 3.0, 1e-5, 1e308, 10**30, 10**400, True, False, [], {}]
JUNK += [
    [1],
    {"x": 1},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_theta": 5e5},
    "llama",
    "clip",
    "silu",
]
JUNK += [{"rope_type": None}, {"rope_theta": "x"}, {"rope_theta": 10**400}, ["llama"]]


def setting(draw, files):
    content = files.get("config.json")
    try:
        config = json.loads(content)
        more = {"rope_scaling", "rope_theta", "quantization_config"}
        key = draw(st.sampled_from(sorted({*config.keys(), *more})))
    except UNUSABLE:
        return set()
    kind = draw(st.sampled_from(["value", "value", "value", "nested", "gone", "twice", "NaN"]))
    text = json.dumps(config | {key: draw(st.sampled_from(JUNK))})
    if kind == "gone":
        config.pop(key, None)
        text = json.dumps(config)
    elif kind == "nested":
        depth = draw(st.sampled_from([60, 70, 900]))
        config[key] = "here"
        text = json.dumps(config).replace('"here"', "[" * depth + "]" * depth)
    elif kind == "twice":
        text = text[:-1] + f", {json.dumps(key)}: 1}}"
    elif kind == "NaN":
        config[key] = "here"
        constant = draw(st.sampled_from(["NaN", "-Infinity", "1e999", '"\\udc80"']))
        text = json.dumps(config).replace('"here"', constant)
    files["config.json"] = text.encode()
    return {"config.json", key}


GROUPS = {
    "weights": [
        *map(raw, [cut, grow, flip, flip, other_length]),
        *map(header, [other_shape, other_dtype, other_view, other_offsets, offsets_of_another]),
        *map(header, [twice, nested, half_character]),
    ],
    "tensors": [
        *map(
            tensors, [drop, add, rename, rename, exchange_values, reshape, resize, convert, convert_all]
        )
    ],
    "places": [special, hostile_index, hostile_index, shards, text_of_json],
    "settings": [setting, setting, text_of_json],
}
EVERY = [damage for group in GROUPS.values() for damage in group]


MODEL_NAMES = [
    f"{part}"
    for part in (
        "tok_embeddings.weight",
        "norm.scale",
        "output.weight",
        *(
            f"layers.{number}.{inner}"
            for number in range(2)
            for inner in "sa_norm.scale mlp_norm.scale attn.q_proj.weight attn.k_proj.weight "
            "attn.v_proj.weight attn.output_proj.weight mlp.w1.weight mlp.w2.weight mlp.w3.weight".split()
        ),
    )
]
SOURCE_NAMES = [source_name(name) for name in MODEL_NAMES]
ALL_NAMES = {*MODEL_NAMES, *SOURCE_NAMES, "config.json"}


def target_names(key):
    return [name for name in MODEL_NAMES if source_name(name) == key]


# Which files are opened.

OPENED: list[str] | None = None


def trace(event, arguments):
    if event == "open" and OPENED is not None and isinstance(arguments[0], str | bytes):
        OPENED.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(trace)
# Modules, which Python may open at any time.
CODE = tuple({sys.prefix, sys.base_prefix, str(Path(directory.__file__).parents[2])})


@pytest.fixture
def opened(monkeypatch):
    """Record what is opened, also by safetensors, of which Python gets no event."""
    real = directory.safe_open

    def recorded(path, **options):
        OPENED.append(os.path.realpath(path))
        assert stat.S_ISREG(os.stat(path).st_mode), f"{path} would block"
        return real(path, **options)

    monkeypatch.setattr(directory, "safe_open", recorded)


def late(*_):
    raise AssertionError("the load hangs")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The files of two undamaged directories."""
    folder = tmp_path_factory.mktemp("bases")
    llama(folder / "one", **SOURCE_SIZES)
    llama(folder / "sharded", shard="3KB", **SOURCE_SIZES)
    found = {
        name: {p.name: p.read_bytes() for p in sorted((folder / name).iterdir())}
        for name in ("one", "sharded")
    }
    assert sum(name.endswith(".safetensors") for name in found["sharded"]) > 2
    for files in found.values():
        files.pop("generation_config.json", None)
    return found


@pytest.fixture(scope="module")
def model():
    return fused_model(**SIZES)


def check(model, before, files, folder, words):
    """Load and compare with what should have been loaded; return "loaded" or "refused"."""
    global OPENED
    OPENED = []
    signal.alarm(30)
    try:
        load_pretrained(model, decoder=folder)
        message = None
    except ValueError as error:
        message = str(error)
    finally:
        signal.alarm(0)
        opened, OPENED = OPENED, None
    inside = str(folder.resolve()) + os.sep
    assert [path for path in opened if not path.startswith((inside, *CODE))] == []
    if message is not None:
        assert str(folder) in message
        assert any(word in message for word in words), (message, words)
        assert same_state(before, model)
        return "refused"
    assert any(
        (path.startswith(inside) and path.endswith(".safetensors")) or "elsewhere" in path
        for path in opened
    )
    prefix = "decoder."
    held = {n.removeprefix(prefix): t for n, t in model.state_dict().items() if n.startswith(prefix)}
    for name, tensor in expected_of(files, MODEL_NAMES).items():
        torch.testing.assert_close(held[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    check_settings(json.loads(content_of(files, "config.json"), object_pairs_hook=once))
    added = {n: t for n, t in before.items() if n.removeprefix(prefix) not in MODEL_NAMES}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in added.items())
    model.load_state_dict(before)
    return "loaded"


@pytest.mark.parametrize("layout", ["one", "sharded"])
def test_the_undamaged_directory_is_loaded(bases, model, tmp_path, layout, opened):
    before = state(model)
    names = [name.removeprefix("decoder.") for name in before if name.startswith("decoder.")]
    assert sorted(n for n in names if "fusion_" not in n) == sorted(MODEL_NAMES)
    lay_out(bases[layout], tmp_path / "x")
    assert check(model, before, bases[layout], tmp_path / "x", set()) == "loaded"


@pytest.mark.usefixtures("opened")
def test_an_extra_axis_is_refused(bases, model, tmp_path):
    before, files = state(model), dict(bases["one"])
    tensors = unpack(files["model.safetensors"])
    dtype, shape, values = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = dtype, [1, *shape], values
    files["model.safetensors"] = pack(tensors)
    lay_out(files, tmp_path / "x")
    words = {"shape: lm_head.weight is [1, 11, 12], output.weight is [11, 12]"}
    assert check(model, before, files, tmp_path / "x", words) == "refused"


def damage_and_check(bases, model, tmp_path, layout, group, num_examples, seed=None):
    """Check a number of damaged directories, without a seed always the same; count the outcomes."""
    before, seen = state(model), Counter()
    lay_out(bases[layout], tmp_path / "outside")
    for name in (INDEX, "model.safetensors"):
        (tmp_path / "outside" / name).write_bytes(bases["one"]["model.safetensors"])

    @settings(
        max_examples=num_examples,
        deadline=None,
        derandomize=seed is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        files = dict(bases[layout])
        first = data.draw(st.sampled_from(GROUPS[group]))
        more = data.draw(st.lists(st.sampled_from(EVERY), max_size=2))
        words = set().union(*(damage(data.draw, files) for damage in (first, *more)))
        folder = tmp_path / "x"
        lay_out(files, folder)
        try:
            seen[check(model, before, files, folder, words)] += 1
        finally:
            shutil.rmtree(folder)
            model.load_state_dict(before)

    usual = signal.signal(signal.SIGALRM, late)
    try:
        (run if seed is None else hypothesis.seed(seed)(run))()
    finally:
        signal.signal(signal.SIGALRM, usual)
    return seen


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="pipes, /dev and /proc")


@on_linux
@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layout", ["one", "sharded"])
def test_damaged_directories(bases, model, tmp_path, layout, group):
    assert damage_and_check(bases, model, tmp_path, layout, group, 12)["refused"] > 0


@pytest.mark.long
@on_linux
@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layout", ["one", "sharded"])
def test_many_damaged_directories(bases, model, tmp_path, layout, group):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    seen = damage_and_check(bases, model, tmp_path, layout, group, 300, seed)
    assert sum(seen.values()) >= 300
    assert seen["refused"] > 100
    assert seen["loaded"] > 0
