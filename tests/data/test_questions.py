import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from torchfuse.data.images import ImageTransform, TiledImageTransform
from torchfuse.data.questions import QuestionDataset, QuestionTransform
from torchfuse.data.readers.formats import FORMATS
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import CheckpointError, ConfigError, DataError

WORDS = ["<pad>", "<bos>", "<unk>", "<eos>", "which", "digit", "?", "one", "two", "and"]
PAD, BOS, _, EOS, WHICH, DIGIT, ASK, ONE, TWO, AND = range(10)
MARK = 10


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, value in (("a.png", 40), ("b.png", 200)):
        Image.new("L", (8, 8), value).save(tmp_path / name)
    return tmp_path


def transform(folder, **options):
    defaults = {"image_token": MARK, "features_per_image": 2, "image_transform": ImageTransform(8)}
    return QuestionTransform(folder, **defaults | options)


def question(text, images=(), **fields):
    record = {"question": text, "images": [str(image) for image in images], **fields}
    return FORMATS["question"].read(record, Path(), "q.jsonl, line 1")


def two_images(folder):
    images = (folder / "a.png", folder / "b.png")
    return question("<image> and <image> which digit ?", images, answer="two")


def test_the_end_of_an_answer_has_a_label(folder):
    sample = transform(folder)(two_images(folder))
    assert sample["tokens"] == [BOS, MARK, AND, MARK, WHICH, DIGIT, ASK, TWO, EOS]
    assert sample["labels"] == [-100] * 7 + [TWO, EOS]  # unshifted, the end is learned
    assert sample["images"].shape == (2, 3, 8, 8)
    assert not torch.equal(sample["images"][0], sample["images"][1])
    prompt = transform(folder)(two_images(folder), with_answer=False)
    assert prompt["tokens"] == sample["tokens"][:7]
    assert "labels" not in prompt


@pytest.mark.parametrize(
    ("options", "markers", "seen"),
    [
        ({"scope": "all"}, 1, [0, 2, 2, 4, 4]),
        ({"scope": "last"}, 1, [0, 2, 2, 2, 2]),
        ({"layout": "placeholder"}, 2, [0, 2, 2, 2, 4]),
        ({"layout": "prefix", "image_token": None}, 0, [4, 4, 4, 4, 4]),
    ],
    ids=str,
)
def test_layouts(folder, options, markers, seen):
    sample = transform(folder, **options)(two_images(folder))
    assert sample["tokens"].count(MARK) == 2 * markers
    assert sample["encoder_mask"].shape == (len(sample["tokens"]), 4)
    assert sample["encoder_mask"].sum(dim=1)[:5].tolist() == seen
    assert sample["encoder_mask"][-1].sum() == seen[-1]


def test_text_alone(folder):
    sample = transform(folder)(question("one and two ?", answer="two"))
    assert sample["images"].shape == (0, 3, 8, 8)
    assert sample["encoder_mask"].shape == (7, 0)


def test_decode_stops_at_the_stop_token(folder):
    assert transform(folder).decode([TWO, MARK, ONE, EOS, DIGIT]) == "two one"
    assert transform(folder).stop_tokens == (EOS,)
    assert transform(folder).pad_id == PAD


def test_images_without_markers_come_first(folder):
    shown = question("which ?", (folder / "a.png",) * 2, answer="one")
    marked = question("<image> <image> which ?", (folder / "a.png",) * 2, answer="one")
    assert transform(folder)(shown)["tokens"] == transform(folder)(marked)["tokens"]
    with pytest.raises(DataError, match="has <image> 1 times, but there are 2 images"):
        question("<image> which ?", (folder / "a.png",) * 2)


def test_nothing_is_truncated(folder):
    with pytest.raises(DataError, match="is 9 tokens long with its answer, and max_seq_len is 8"):
        transform(folder, max_seq_len=8)(two_images(folder))
    assert transform(folder, max_seq_len=9)(two_images(folder))


def test_cached_pixels_are_the_same(folder):
    cached = transform(folder, cache_images=1)
    for _ in range(2):
        got = cached(two_images(folder))
        assert torch.equal(got["images"], transform(folder)(two_images(folder))["images"])


def test_bad_options(folder):
    with pytest.raises(ConfigError, match='layout must be "marker"'):
        transform(folder, layout="infix")
    with pytest.raises(ConfigError, match="image_token=10 does not fit layout='prefix'"):
        transform(folder, layout="prefix")
    with pytest.raises(ConfigError, match="image_token=None does not fit"):
        transform(folder, image_token=None)


def write(folder, *lines):
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


GOOD = {"question": "<image> which ?", "answer": "one", "images": ["a.png"], "kind": "k"}


def test_a_file_of_questions(folder):
    file = write(folder, GOOD, "", {"question": "one ?", "answer": "one"})
    dataset = QuestionDataset(transform(folder), file)
    first, second = dataset.samples
    assert [image.path for image in first.images] == [folder / "a.png"]
    assert (first.answer, first.metadata["kind"]) == ("one", "k")
    assert second.images == []
    assert len(dataset) == 2
    assert [len(s["images"]) for s in dataset] == [1, 0]
    assert len(QuestionDataset(transform(folder), file, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: expected a JSON object, got a list"),
        (GOOD | {"anser": "x"}, "line 2: unknown field anser; there are question, answer, images, kind"),
        ({"answer": "x"}, "line 2: the field question is missing"),
        (GOOD | {"question": 3}, "line 2: question must be a text, got 3"),
        (GOOD | {"images": {"a": "a.png"}}, "line 2: image must be a path, bytes or a struct"),
        (GOOD | {"images": [3]}, "line 2: image must be a path, bytes or a struct"),
        (GOOD | {"images": []}, "line 2: the conversation has <image> 1 times, but there are 0 images"),
        (GOOD | {"images": ["c.png"]}, "line 2: The image .*c.png cannot be opened"),
        (GOOD | {"images": ["tokenizer.json"]}, "line 2: .*tokenizer.json is no image"),
    ],
    ids=str,
)
def test_a_broken_line_is_named(folder, line, complaint):
    file = write(folder, GOOD, line)
    with pytest.raises(DataError, match=complaint) as info:
        QuestionDataset(transform(folder), file)
    assert str(info.value).startswith(str(file))


def test_files_without_questions_or_answers(folder):
    with pytest.raises(DataError, match="cannot be read: it is empty"):
        QuestionDataset(transform(folder), write(folder, ""))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        QuestionDataset(transform(folder), folder / "none.jsonl")
    with pytest.raises(DataError, match="line 1 has no answer"):
        QuestionDataset(transform(folder), write(folder, {"question": "one ?"}))
    with pytest.raises(DataError, match="line 1 has no answer"):
        transform(folder)(question("one ?"))


def test_tokenizers_and_their_special_tokens(folder):
    tokenizer = TextTokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("which one")) == "which one"
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [3, 7]}))
    several = TextTokenizer(folder)
    assert (several.eos_id, several.eos_ids, several.pad_id) == (3, (3, 7), 3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5, "pad_token_id": None}))
    assert TextTokenizer(folder).eos_ids == (5,)
    (folder / "config.json").write_text("{}")
    assert TextTokenizer(folder).bos_id is None
    (folder / "generation_config.json").unlink()
    with pytest.raises(
        CheckpointError, match="must configure eos_token_id, an id or a list of ids, got None"
    ):
        TextTokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no tokenizer"):
        TextTokenizer(folder)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextTokenizer(Path(folder) / "elsewhere")


def test_lines_end_where_json_lines_end(folder):
    """Not at characters that Unicode counts as ends of lines."""
    text = "which digit\u2028 ?\x85"
    record = json.dumps({"question": text, "answer": "one"}, ensure_ascii=False)
    (folder / "lines.jsonl").write_text(f"{record}\n\n{record}\r\n", encoding="utf-8")
    dataset = QuestionDataset(transform(folder), folder / "lines.jsonl")
    assert [sample.prompt[0].text for sample in dataset.samples] == [text] * 2


@pytest.mark.parametrize("begin", [0, 1, 5])
def test_padding_differs_from_bos(folder, begin):
    config = {"bos_token_id": begin, "eos_token_id": begin}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer(folder)
    assert tokenizer.bos_id == tokenizer.eos_id == begin
    assert tokenizer.pad_id != begin
    assert 0 <= tokenizer.pad_id < len(WORDS)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token_id": 3}, 3),
        ({"pad_token_id": 3, "vocab_size": 4}, 3),
        ({}, 2),
        ({"pad_token_id": -1}, 2),
        ({"pad_token_id": 4, "vocab_size": 4}, 2),
        ({"pad_token_id": 4, "text_config": {"vocab_size": 4}}, 2),
    ],
    ids=str,
)
def test_padding_outside_the_vocabulary_is_replaced(folder, config, expected):
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2} | config))
    assert TextTokenizer(folder).pad_id == expected


@pytest.mark.parametrize("ids", [{"bos_token_id": -1}, {"eos_token_id": [2, -1]}, {"eos_token_id": []}])
def test_first_and_last_tokens_are_ids(folder, ids):
    config = {"bos_token_id": 1, "eos_token_id": 2} | ids
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=f"must configure {next(iter(ids))}, an id or a list of ids, got"
    ):
        TextTokenizer(folder)


def test_a_question_that_is_too_long_is_named(folder):
    long = {"question": "which digit ?", "answer": "two and one and two"}
    file = write(folder, {"question": "which ?", "answer": "one"}, long)
    with pytest.raises(
        DataError, match="line 2 is 10 tokens long with its answer, and max_seq_len is 9"
    ):
        QuestionDataset(transform(folder, max_seq_len=9), file)


def test_tiles_are_refused(folder):
    with pytest.raises(ConfigError, match="image_transform is a TiledImageTransform, but every image"):
        transform(folder, image_transform=TiledImageTransform(8))
