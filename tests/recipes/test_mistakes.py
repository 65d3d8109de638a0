"""Mistakes in data and configuration: each ends the run with one sentence, and nothing is written."""

import json

import pytest
from own_data import error_of_run, make_folder

USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hi."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("mistakes"))
    (folder / "no_tokenizer").mkdir()
    (folder / "pictures" / "cut.png").write_bytes((folder / "pictures" / "1.png").read_bytes()[:40])
    (folder / "broken.jinja").write_text("{% for message in messages %}")
    (folder / "silent.jinja").write_text("{{ bos_token }}")
    return folder


@pytest.fixture
def message(folder, tmp_path, monkeypatch, capfd):
    """What a run prints as its error, by changes of a configuration that is right."""

    def message(**changes):
        options = {"output_dir": str(tmp_path / "run")} | changes
        error = error_of_run(folder, monkeypatch, capfd, **options)
        assert not (tmp_path / "run").exists()
        return error

    return message


IN_CONFIGURATION = {
    "no_data": ({"data": {"train": None}}, "data.train"),
    "no_file": ({"data": {"train": "none.json"}}, "none.json"),
    "key_of_a_set": ({"data": {"train": [{"path": "llava.json", "wieght": 1}]}}, "wieght"),
    "weight": ({"data": {"train": [{"path": "llava.json", "weight": 0}]}}, "weight"),
    "one_weight": (
        {"data": {"train": [{"path": "llava.json", "weight": 1}, {"path": "rows.parquet"}]}},
        "weight",
    ),
    "format": ({"data": {"train": [{"path": "llava.json", "format": "llama"}]}}, "llava"),
    "other_format": ({"data": {"train": [{"path": "llava.json", "format": "texts"}]}}, "texts"),
    "template": ({"data": {"template": "llama9"}}, "llama3"),
    "template_syntax": ({"data": {"template": "broken.jinja"}}, "broken.jinja is no Jinja template"),
    "template_without_text": ({"data": {"template": "silent.jinja"}}, "silent.jinja"),
    "no_tokenizer": ({"data": {"tokenizer": "no_tokenizer"}}, "tokenizer.json"),
    "no_processor": ({"data": {"image_transform": "llama"}}, "preprocessor_config.json"),
    "image_token": ({"data": {"image_token": 65}}, "image_token is 65"),
    "features": ({"data": {"features_per_image": 7}}, "features_per_image is 7"),
    "too_long": ({"data": {"too_long": "shorten"}}, "too_long"),
    "bad_samples": ({"data": {"bad_samples": "ignore"}}, "bad_samples"),
    "workers": ({"data": {"num_workers": -1}}, "num_workers=-1"),
    "start_method": ({"data": {"start_method": "thread"}}, "start_method"),
    "max_seq_len": ({"data": {"max_seq_len": 0}}, "max_seq_len=0"),
    "more_than_the_model": (
        {"data": {"max_seq_len": 258}},
        "max_seq_len is 258, and the model's is 257",
    ),
    "limit": ({"data": {"limit": 7}}, "data.limit=7"),
    "all_too_long": ({"data": {"max_seq_len": 5}}, "6 because they are longer than 5 tokens"),
    "too_few": ({"train": {"batch_size": 121}}, "too few for one step"),
    "typo": ({"data": {"pakced": True}}, "'data.pakced': unknown"),
}


@pytest.mark.parametrize("mistake", IN_CONFIGURATION)
def test_in_the_configuration(message, mistake):
    changes, expected = IN_CONFIGURATION[mistake]
    assert expected in message(**changes)


def test_no_sample_can_be_used(message, folder):
    (folder / "rows.jsonl").write_text('{"messages": []}\n' * 5)
    data = {"train": "rows.jsonl", "bad_samples": "skip"}
    got = message(data=data, train={"batch_size": 2, "max_steps": 7, "epochs": 9})
    assert "2 steps in a row had nothing to learn: 4 samples were left out because" in got


IN_ROWS = {
    "no_json": ('{"messages": ', "line 2"),
    "twice": ('{"messages": [], "messages": []}', "line 2"),
    "surrogate": (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "line 2"),
    "network": ({"messages": [USER, ASSISTANT], "images": ["https://x.org/a.png"]}, "downloaded"),
    "role": ({"messages": [USER | {"role": "tool"}, ASSISTANT]}, "tool"),
    "empty": ({"messages": []}, "line 2"),
    "no_answer": ({"messages": [USER]}, "no answer"),
    "no_question": ({"messages": [ASSISTANT]}, "line 2"),
    "tags": (
        {"messages": [USER | {"content": "<image><image>?"}, ASSISTANT], "images": ["pictures/1.png"]},
        "2",
    ),
    "no_image": (
        {"messages": [USER | {"content": "<image>?"}, ASSISTANT], "images": ["none.png"]},
        "none.png",
    ),
    "damaged_image": (
        {"messages": [USER | {"content": "<image>?"}, ASSISTANT], "images": ["pictures/cut.png"]},
        "cut.png",
    ),
    "nothing_to_learn": ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "nothing to learn"),
    "long": ({"messages": [USER | {"content": "long " * 99}, ASSISTANT]}, "max_seq_len is 257"),
}


@pytest.mark.parametrize("mistake", IN_ROWS)
def test_in_a_row(message, folder, mistake):
    row, expected = IN_ROWS[mistake]
    good = json.dumps({"messages": [USER, ASSISTANT]})
    rows = [good, row if isinstance(row, str) else json.dumps(row), *[good] * 2]
    (folder / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows))
    data = {"train": "rows.jsonl", "too_long": "error"}
    got = message(data=data, train={"batch_size": 4, "max_steps": 1})
    assert expected in got
    assert "rows.jsonl" in got
    assert "line 2" in got
