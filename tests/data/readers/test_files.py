"""Files of the libraries that own their formats, read into the same samples."""

import io
import itertools
import json
import pickle
import random
import string
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import datasets
import pandas
import pyarrow
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet
from sample_records import (
    CAT,
    DOG,
    PIXELS,
    llava,
    messages,
    said,
    write_array,
    write_images,
    write_lines,
)

from torchfuse.data import read_samples
from torchfuse.data.readers import arrow_rows, json_rows
from torchfuse.errors import DataError

RECORDS = {
    "llava": [llava("<image>\nQ0", "A0", image=CAT), llava("Q1", "A1", "<image>R1", "B1", image=DOG)],
    "messages": [messages("<image>Q0", "A0", images=[CAT]), messages("Q1", "A1", "R1", "B1", images=[])],
    "parts": [
        messages([{"type": "image"}, {"type": "text", "text": "Q0"}], "A0", images=[CAT]),
        messages([{"type": "text", "text": "Q1"}], "A1", images=[]),
    ],
    "prompt": [{"prompt": f"Q{i}", "completion": f"A{i}", "image": CAT} for i in range(2)],
    "texts": [
        {"texts": [{"user": f"Q{i}", "assistant": "A"}], "images": [CAT, DOG][i:]} for i in range(2)
    ],
    "question": [
        {"question": f"Q{i}", "answer": "A", "images": [CAT, DOG], "kind": "k"} for i in range(2)
    ],
    "vqa": [{"question": f"Q{i}", "answers": ["A", "B"], "image": CAT} for i in range(2)],
}
RECORDS["parts"][1]["messages"][1]["content"] = [{"type": "text", "text": "A1"}]
RECORDS["parts"][0]["messages"][1]["content"] = [{"type": "text", "text": "A0"}]


def embedded(record):
    """A record with images as bytes and paths, as datasets keeps them."""

    def as_struct(name):
        return {"bytes": PIXELS[name], "path": name}

    fields = {"image": as_struct, "images": lambda names: [as_struct(name) for name in names]}
    return {key: fields[key](value) if key in fields else value for key, value in record.items()}


def array(folder, records):
    return write_array(folder / "data.json", records)


def indented(folder, records):
    return write_array(folder / "data.json", records, indent=2, ensure_ascii=False)


def lines(folder, records):
    return write_lines(folder / "data.jsonl", records)


def with_datasets(folder, records):
    feature = {"image": datasets.Image(), "images": datasets.List(datasets.Image())}
    dataset = datasets.Dataset.from_list([embedded(record) for record in records])
    for name in feature.keys() & dataset.features.keys():
        dataset = dataset.cast_column(name, feature[name])
    return dataset


def datasets_folder(folder, records):
    with_datasets(folder, records).save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def datasets_parquet(folder, records):
    with_datasets(folder, records).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def parquet_of_paths(folder, records):
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "data.parquet", row_group_size=1)
    return folder / "data.parquet"


def pandas_parquet(folder, records):
    pandas.DataFrame(records).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def arrow_file(folder, records):
    feather.write_feather(pyarrow.Table.from_pylist(records), folder / "data.arrow", chunksize=1)
    return folder / "data.arrow"


WRITERS = [
    array,
    indented,
    lines,
    datasets_folder,
    datasets_parquet,
    parquet_of_paths,
    pandas_parquet,
    arrow_file,
]


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_file_holds_the_same_samples(tmp_path, write, records):
    write_images(tmp_path)
    found = read_samples(write(tmp_path, records), image_root=tmp_path)
    expected = read_samples(write_lines(tmp_path / "expected.jsonl", records))
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert said(one.messages) == said(other.messages)
        assert [m.weight for m in one.messages] == [m.weight for m in other.messages]
        assert one.metadata == other.metadata


SHARDS = {
    "json": lambda i: {"jpg": PIXELS[CAT], "json": llava("<image>\nQ", f"A{i}")},
    "name": lambda i: {
        "jpg": PIXELS[CAT],
        "json": llava("<image>\nQ", f"A{i}", image=f"dir/{i:03}.jpg"),
    },
    "suffix": lambda i: {"jpg": PIXELS[CAT], "json": llava("<image>\nQ", f"A{i}", image="jpg")},
    "energon": lambda i: {"jpg": PIXELS[CAT], "json": {"context": "\nQ", "answers": [f"A{i}", "B"]}},
    "txt": lambda i: {"jpg": PIXELS[CAT], "txt": f"A{i}"},
}


@pytest.mark.parametrize("kind", SHARDS)
def test_tar_shards(tmp_path, kind):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for i in range(3 * shard, 3 * shard + 3):
                writer.write({"__key__": f"dir/{i:03}", **SHARDS[kind](i)})
    samples = read_samples(tmp_path)
    assert [sample.answer for sample in samples] == [f"A{i}" for i in range(6)]
    assert samples[4].origin == f"{tmp_path / '1.tar'}, row 1"
    assert [media.read() for media in samples[4].images] == [PIXELS[CAT]]
    text = {"energon": " \nQ", "txt": ""}.get(kind, "\nQ")
    assert samples[4].messages[0].text == text
    assert len(read_samples(tmp_path / "[01].tar")) == 6
    assert len(read_samples(tmp_path / "1.tar")) == 3


def test_a_tar_sample_with_two_images_and_long_names(tmp_path):
    key = "below/" + "n" * 150
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        images = {"0.png": PIXELS[CAT], "1.png": PIXELS[DOG]}
        for i in range(3):
            writer.write(
                {"__key__": f"{key}{i}", **images, "json": {"question": f"Q{i}", "answer": "A"}}
            )
    sample = read_samples(tmp_path / "a.tar")[1]
    assert said(sample.messages)[0] == ("user", [PIXELS[CAT], " ", PIXELS[DOG], " Q1"])
    assert str(sample.images[0]) == f"{tmp_path / 'a.tar'}/{key}1.0.png"


def test_tar_samples_that_cannot_be_used(tmp_path):
    def write(*members):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return tmp_path / "a.tar"

    good = [("0.jpg", PIXELS[CAT]), ("0.txt", b"A")]
    for member, complaint in [
        (("1.jpg", b"x"), "needs a .json or .txt member, there are 1.jpg"),
        (("1.json", b"[]"), "expected a JSON object, got a list"),
        (("1.json", b'{"caption": "A", "image": "2.jpg", "image": 3}'), "the key 'image' is twice"),
    ]:
        samples = read_samples(write(*good, member))
        with pytest.raises(DataError, match=f"a.tar, row 1: .*{complaint}"):
            samples[1]
    content = write(*good, *good).read_bytes()
    for damaged in (content[:2000], content[:1024] + b"x" * 512 + content[1536:]):
        (tmp_path / "a.tar").write_bytes(damaged)
        with pytest.raises(DataError, match="a.tar cannot be read as a tar file: "):
            read_samples(tmp_path / "a.tar")


def test_question_files(tmp_path):
    write_images(tmp_path)
    records = [
        {"question": "<image> and <image> ?", "answer": "A", "images": [CAT, DOG], "kind": "k"},
        {"question": "which ?", "images": [CAT, DOG]},
        {"question": "none ?", "answer": "B"},
    ]
    samples = read_samples(write_lines(tmp_path / "q.jsonl", records))
    contents = [
        "".join(part if isinstance(part, str) else "<image>" for part in sample.messages[0].content)
        for sample in samples
    ]
    assert [text.replace(" ", "") for text in contents] == [
        "<image>and<image>?",
        "<image><image>which?",
        "none?",
    ]
    for sample, record in zip(samples, records, strict=True):
        assert [image.path for image in sample.images] == [
            tmp_path / name for name in record.get("images", [])
        ]
        assert sample.answer == record.get("answer")
        assert sample.metadata["kind"] == record.get("kind", "question")


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_slices_and_pickles_read_on_demand(tmp_path, write):
    records = [llava("<image>\nQ", f"A{i}", image=CAT) for i in range(11)]
    samples = read_samples(write(tmp_path, records))
    assert samples[-1].answer == "A10"
    assert [sample.answer for sample in samples[2:9:3][1:]] == ["A5", "A8"]
    with pytest.raises(IndexError):
        samples[11]
    again = pickle.loads(pickle.dumps(samples[::-1]))
    assert [sample.answer for sample in again] == [f"A{10 - i}" for i in range(11)]
    assert again.digest == samples[::-1].digest != samples.digest


def test_samples_are_read_in_a_spawned_process(tmp_path):
    records = [llava("<image>\nQ", f"A{i}", image=CAT) for i in range(5)]
    files = [lines(tmp_path, records), datasets_folder(tmp_path, records)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for file in files:
            samples = read_samples(file)
            assert pool.submit(samples.__getitem__, 3).result().messages == samples[3].messages


def test_files_that_are_no_samples(tmp_path):
    for name, content, complaint in [
        ("a.jsonl", b"", "a.jsonl cannot be read: it is empty"),
        ("a.json", b"[]", "a.json .*holds no row"),
        ("a.json", b"  \n", "a.json .*holds no row"),
        ("a.txt", b"hello", "a.txt is no file of samples; it must be a JSON array"),
        ("a.json.gz", b"\x1f\x8b\x08", "a.json.gz is compressed; unpack it first"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet cannot be read: "),
        ("a.arrow", b"ARROW1 and then nothing", "a.arrow cannot be read: "),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            read_samples(tmp_path / name)
    with pytest.raises(DataError, match="missing.json cannot be read: No such file"):
        read_samples(tmp_path / "missing.json")
    with pytest.raises(DataError, match=r"No file matches .*\*.parq"):
        read_samples(tmp_path / "*.parq")
    with pytest.raises(
        DataError, match=r"holds files of several kinds \(.parquet, .arrow, .jsonl, .json\)"
    ):
        read_samples(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no file that ends in .parquet"):
        read_samples(tmp_path / "empty")


def test_a_folder_of_splits_names_them(tmp_path):
    dataset = datasets.Dataset.from_list([messages("Q", "A")])
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "d")
    with pytest.raises(
        DataError, match="holds several data sets; give the folder of one of them: .*d/train, "
    ):
        read_samples(tmp_path / "d")
    assert len(read_samples(tmp_path / "d" / "train")) == 1


def test_lines_are_counted_as_editors_count_them(tmp_path):
    good, bad = json.dumps(messages("Q", "A")), '{"messages": 3}'
    (tmp_path / "a.jsonl").write_text(f"\n{good}\n\n  \n{bad}\n{good}\n\n{bad}")
    samples = read_samples(tmp_path / "a.jsonl")
    assert len(samples) == 4
    assert [samples.origin(i)[1] for i in range(4)] == ["line 2", "line 5", "line 6", "line 8"]
    for index in (1, 3):
        with pytest.raises(
            DataError, match=f"a.jsonl, line {(5, 8)[index // 2]}: messages must be a list"
        ):
            samples[index]
    (tmp_path / "a.jsonl").write_text(f"\ufeff{good}\r\n{good}\r\n")
    assert [sample.answer for sample in read_samples(tmp_path / "a.jsonl")] == ["A", "A"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"messages": [], "messages": []}', "the key 'messages' is twice in one object"),
        (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "surrogates not allowed"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "can't decode byte 0xff"),
        (b'{"messages": [], "score": NaN}', "NaN is no finite number"),
        (b"{", "Expecting property name"),
        (b"[]", "expected a JSON object, got a list"),
        (b"[" * 100_000, "recursion|Expecting value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_that_readers_read_differently_is_refused_with_its_line(tmp_path, line, complaint):
    good = json.dumps(messages("Q", "A", x="\U0001f600")).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]))
    samples = read_samples(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=f"a.jsonl, line 2: .*({complaint})"):
        samples[1]
    assert samples[2].metadata == {"x": "\U0001f600"}


TEXT = st.text(alphabet='"\\{}[],: \nab\u00e9\U0001f600', max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(
        st.one_of(TEXT, st.none(), st.integers(), st.dictionaries(TEXT, st.lists(TEXT)), st.lists(TEXT))
    ),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_elements_of_an_array_are_found_as_json_finds_them(tmp_path_factory, rows, indent, ascii, chunk):
    file = tmp_path_factory.mktemp("array") / "a.json"
    write_array(file, rows, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK", chunk)
        found = json_rows.JsonRows(file)
    assert [found[i] for i in range(len(found))] == json.loads(file.read_text())


def test_arrays_that_are_no_json(tmp_path):
    row = json.dumps(messages("Q", "A"))
    for text, complaint in [
        (f"[{row}\n{row}]", "expected a comma before row 1, on line 1"),
        (f"[{row},\n,{row}]", "expected a comma before row 1, on line 1, got ."),
        (f"[{row},\n{row}", "it ends without a closing bracket"),
        (f"[{row},\n{row[:-1]}", "it ends within row 1, which starts on line 2"),
        (f"[{row},\n{row}] {row}", "it goes on after the end of the array on line 2"),
        (f"[{row},\n{row},]", "expected no comma after the last row, on line 2, got ','"),
        (f"[{row},\n{row}}}", r"it begins with \[ and ends with }"),
        ("[", "it ends without a closing bracket"),
        ('["a", \n ', "it ends without a closing bracket"),
    ]:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=f"a.json is no JSON array: {complaint}"):
            read_samples(tmp_path / "a.json")


def test_rows_of_an_array_are_refused_one_by_one(tmp_path):
    row = json.dumps(messages("Q", "A"))
    (tmp_path / "a.json").write_text(f'["a, b", {row}, 3, {{"messages": [}}], {row}, {{"messages": 1}}]')
    samples = read_samples(tmp_path / "a.json")
    broken = {}
    for index in range(len(samples)):
        try:
            samples[index]
        except DataError as error:
            broken[index] = str(error)
    assert [*broken] == [0, 2, 3, 5]
    assert "a.json, row 2: expected a JSON object, got a int" in broken[2]


def test_a_column_twice_is_refused(tmp_path):
    table = pyarrow.table([["Q"], ["R"]], names=["question", "question"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has the column question twice"):
        read_samples(tmp_path / "a.parquet")


def test_large_row_groups_are_read_in_small_ones(tmp_path, monkeypatch):
    records = [messages("Q", f"A{i}") for i in range(1000)]
    file = pandas_parquet(tmp_path, records)
    whole = read_samples(file)
    monkeypatch.setattr(arrow_rows, "_LARGE", 1000)
    small = read_samples(file)
    order = random.Random(0).sample(range(1000), 20)
    assert (
        [small[i].answer for i in order] == [f"A{i}" for i in order] == [whole[i].answer for i in order]
    )
    assert small.tables[0].rows._group[1].num_rows < 300
    assert small.digest == whole.digest
    assert pickle.loads(pickle.dumps(small))[999].answer == "A999"


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_digest_changes_with_the_rows_and_their_order(tmp_path, write):
    records = [llava("<image>\nQ", f"A{i}", image=CAT) for i in range(5)]

    def digest(name, records):
        (tmp_path / name).mkdir()
        return read_samples(write(tmp_path / name, records), image_root=tmp_path).digest

    swapped = [records[i] for i in (0, 2, 1, 3, 4)]
    other = [*records[:4], llava("<image>\nQ", "B4", image=CAT)]
    found = [digest(*pair) for pair in zip("abcd", (records, records, swapped, other), strict=True)]
    assert found[0] == found[1]
    assert len({*found}) == 3


def test_the_digest_of_a_large_file_has_its_first_and_last_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_rows, "_BLOCK", 10)
    monkeypatch.setattr(arrow_rows, "_BLOCKS", 7)
    content = bytearray(string.printable.encode() * 10)
    found = set()
    for changed in (None, 0, 999):
        file = tmp_path / "a"
        if changed is not None:
            content[changed] ^= 1
        file.write_bytes(content)
        found.add(arrow_rows.file_digest(file))
    assert len(found) == 3


def test_formats_are_detected_file_by_file(tmp_path):
    for name, records in itertools.islice(RECORDS.items(), 3):
        write_lines(tmp_path / f"{name}.jsonl", ["not a record", *records])
    samples = read_samples(tmp_path, image_root=tmp_path)
    assert [table.format for table in samples.tables] == ["llava", "messages", "messages"]
    assert len(samples) == 9
    assert samples[4].answer == "A0"
    with pytest.raises(DataError, match="messages.jsonl, line 1: expected a JSON object, got a str"):
        samples[3]
