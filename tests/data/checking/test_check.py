import itertools
import json
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sample_records import CAT, DOG, llava, messages, write_array, write_images, write_lines
from word_transform import WordTransform

from torchfuse.data import Report, check_samples, read_samples
from torchfuse.data.checking.report import RowProblem
from torchfuse.errors import ConfigError, DataError

GOOD = [
    llava("<image>\nwhich animal ?", "a cat", image=CAT),
    llava("first <image> then <image> ?", "two", image=[CAT, DOG]),
    llava("no image ?", "none", "sure ?", "yes", id="7"),
    llava("which animal ?", "", image=DOG),
]
LONG = llava("word " * 50, "a")
BROKEN = {
    "no JSON": ('{"conversations": [', "Expecting value"),
    "half a surrogate pair": (json.dumps(llava("\ud83d", "A")), "surrogates not allowed"),
    "a key twice": ('{"image": "cat.png", "image": "dog.png"}', "the key 'image' is twice"),
    "no object": ("[1]", "expected a JSON object, got a list"),
    "two formats": (llava("Q", "A") | messages("Q", "A"), "fields of the formats llava and messages"),
    "unknown role": ({"conversations": [{"from": "robot", "value": "A"}]}, "unknown role 'robot'"),
    "empty conversation": (llava(), "the conversation is empty"),
    "answer without question": (
        {"conversations": [{"from": "gpt", "value": "A"}]},
        "message 1 is an answer without question",
    ),
    "tags without images": (llava("<image><image>Q", "A", image=CAT), "2 times, but there are 1 images"),
    "missing image": (
        llava("<image>Q", "A", image="gone.png"),
        "gone.png cannot be opened: No such file",
    ),
    "no image": (llava("<image>Q", "A", image="text.png"), "text.png is no image"),
    "network": (llava("<image>Q", "A", image="https://a.org/b.png"), "would have to be downloaded"),
    "no answer": (llava("Q"), "has no answer"),
    "too long": (LONG, "52 tokens long, and max_seq_len is 30"),
}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    (tmp_path / "text.png").write_text("text")
    return tmp_path


@pytest.mark.parametrize(
    ("num_rows", "workers"),
    [(300, 0), (300, 2), pytest.param(5000, None, marks=pytest.mark.long)],
)
def test_all_broken_rows_are_found_and_no_others(folder, num_rows, workers):
    generator = random.Random(num_rows)
    rows = [generator.choice(GOOD) for _ in range(num_rows)]
    places = generator.sample(range(num_rows), 2 * len(BROKEN))
    broken = dict(zip(places, [*BROKEN.values()] * 2, strict=True))
    for place, (row, _) in broken.items():
        rows[place] = row
    file = folder / "data.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    report = check_samples(file, transform=WordTransform(30), workers=workers)
    found = {problem.index: problem for problem in (*report.errors, *report.too_long)}
    assert found.keys() == broken.keys()
    for index, problem in found.items():
        assert broken[index][1] in problem.message
        assert (problem.path, problem.row) == (file, f"line {index + 1}")
        assert str(file) not in problem.message
    assert [problem.index for problem in report.too_long] == sorted(places[i] for i in (13, 27))
    assert not report.ok
    assert len(report.lengths) == num_rows - 2 * (len(BROKEN) - 1)


def test_the_numbers_of_a_report(folder):
    Image.new("L", (20, 10)).save(folder / "wide.png")
    rows = [*GOOD, llava("<image>Q", "A b c d", image="wide.png")]
    report = check_samples(write_array(folder / "a.json", rows), transform=WordTransform(30))
    lengths = [len(WordTransform()(sample)["tokens"]) for sample in read_samples(folder / "a.json")]
    assert report.lengths.tolist() == lengths == [7, 7, 8, 5, 7]
    assert report.num_learned == 2 + 1 + 1 + 1 + 0 + 4
    assert report.image_sizes == {(5, 3): 4, (20, 10): 1}
    assert report.ok
    text = str(report)
    assert text.startswith("5 rows: 0 errors, 0 too long")
    assert "34 tokens in rows without errors, 9 of them learned (26.5%)" in text
    assert "5 images by width x height:\n  5 x 3: 4\n  20 x 10: 1" in text
    assert "packing: 5 rows fit into 2 sequences of 30 positions, 56.7% of them tokens" in text
    prefix = check_samples(folder / "a.json", transform=WordTransform(30, layout="prefix"))
    assert prefix.lengths.tolist() == [10, 13, 8, 8, 10]


def test_all_images_of_a_row_are_named(folder):
    row = llava("<image><image><image>Q", "A", image=["gone.png", CAT, "text.png"])
    report = check_samples(write_array(folder / "a.json", [row]), transform=WordTransform())
    (problem,) = report.errors
    assert problem.row == "row 0"
    assert "gone.png cannot be opened" in problem.message
    assert "text.png is no image" in problem.message


def test_several_files_and_an_exception_of_the_transform(folder):
    class Failing(WordTransform):
        def __call__(self, sample):
            if sample.answer == "B":
                raise KeyError("what")
            return super().__call__(sample)

    files = [
        write_lines(folder / f"{name}.jsonl", [messages("Q", "A"), messages("Q", name)]) for name in "AB"
    ]
    report = check_samples([files[0], read_samples(files[1])], transform=Failing())
    assert report.num_rows == 4
    (problem,) = report.errors
    assert (problem.path, problem.row, problem.index) == (files[1], "line 2", 3)
    assert problem.message == "KeyError: 'what'"
    with pytest.raises(DataError, match="gone.json cannot be read"):
        check_samples(folder / "gone.json", transform=Failing())


def lines_of(report):
    return str(report).splitlines()


def test_histograms_count_every_row():
    generator = np.random.default_rng(3)
    for lengths in ([1], [5, 5], [1, 2, 3], generator.lognormal(4, 1.1, 997).astype(np.int64) + 1):
        report = Report(len(lengths), [], [], np.array(lengths), 1, {}, None)
        bars = [line.split() for line in lines_of(report) if line.startswith("  ") and " to " in line]
        assert sum(int(bar[-1].replace(",", "")) for bar in bars) == len(lengths)
        ranges = [tuple(int(n.replace(",", "")) for n in (bar[0], bar[2])) for bar in bars]
        assert ranges[0][0] == min(lengths)
        assert ranges[-1][1] == max(lengths)
        assert all(b == c - 1 for (_, b), (c, _) in itertools.pairwise(ranges))


def test_long_lists_are_cut_in_the_text_only(tmp_path):
    problems = [RowProblem(tmp_path, f"line {i}", i, "x") for i in range(60)]
    sizes = Counter({(100 + i, 7): i + 1 for i in range(11)})
    report = Report(60, problems, [], np.array([], np.int64), 0, sizes, 30)
    assert f"{tmp_path}: 60 errors" in lines_of(report)
    assert "  and 10 more" in lines_of(report)
    assert "  3 other sizes, sides of 7 to 102: 6" in lines_of(report)


def test_a_long_list_has_rows_of_each_kind(folder):
    rows = [llava("<image>Q", "A", image=f"gone{index}.png") for index in range(180)]
    rows[90], rows[179] = llava("<image>Q", "A"), llava("Q")
    report = check_samples(write_lines(folder / "a.jsonl", rows), transform=WordTransform())
    lines = str(report).splitlines()
    assert sum("cannot be opened: No such file" in line for line in lines) == 50 // 3
    assert lines.count(f"  and {178 - 50 // 3} more like these") == 1
    assert "  line 91: the conversation has <image> 1 times, but there are 0 images" in lines
    assert "  line 180: has no answer" in lines


class Killed(WordTransform):
    def __call__(self, sample):
        if sample.metadata.get("id") == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(sample)


def test_a_process_that_dies_is_an_error_with_its_row(folder):
    rows = [GOOD[2]] * 700
    rows[413] = GOOD[2] | {"id": "killed"}
    file = write_lines(folder / "a.jsonl", rows)
    with pytest.raises(
        DataError, match=r"^A worker process ended while .*a\.jsonl, line 414\b.* was read"
    ):
        check_samples(file, transform=Killed(), workers=2)


def test_a_negative_number_of_workers_is_refused(folder):
    file = write_lines(folder / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match="workers must be at least 0, got -1"):
        check_samples(file, transform=WordTransform(), workers=-1)
