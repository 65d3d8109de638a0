"""Records of every format against the messages that they mean."""

import base64
import re
from urllib.parse import quote

import pytest
from sample_records import CAT, DOG, PIXELS, llava, messages, said, write_images, write_lines

from torchfuse.data import Media, read_samples
from torchfuse.errors import ConfigError, DataError

CAT_BYTES, DOG_BYTES = PIXELS[CAT], PIXELS[DOG]
DATA_URL = f"data:image/png;base64,{base64.b64encode(CAT_BYTES).decode()}"
QA = ("<image>\nQ", "A")
TEXT, IMAGE = {"type": "text", "text": "Q"}, {"type": "image"}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


def read(folder, record, **options):
    (sample,) = read_samples(write_lines(folder / "data.jsonl", [record]), **options)
    return sample


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (llava(*QA, image=CAT), [CAT_BYTES, "\nQ"]),
        (llava(*QA, image=[CAT]), [CAT_BYTES, "\nQ"]),
        (llava("<image>\n<image>\nQ", "A", image=[CAT, DOG]), [CAT_BYTES, "\n", DOG_BYTES, "\nQ"]),
        (llava("x<image>y<image>", "A", images=[CAT, DOG]), ["x", CAT_BYTES, "y", DOG_BYTES]),
        (llava("Q", "A"), ["Q"]),
        (llava("Q", "A", image=None), ["Q"]),
        (messages(*QA, images=[CAT]), [CAT_BYTES, "\nQ"]),
        (messages("Q <image>", "A", image=CAT), ["Q ", CAT_BYTES]),
        (messages("Q", "A", images=[CAT]), [CAT_BYTES, "Q"]),
        (messages([TEXT, IMAGE], "A", images=[CAT]), ["Q", CAT_BYTES]),
        (messages([IMAGE | {"text": None}, TEXT], "A", images=[CAT]), [CAT_BYTES, "Q"]),
        (messages([IMAGE | {"image": CAT}, TEXT], "A"), [CAT_BYTES, "Q"]),
        (messages([{"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT], "A"), [CAT_BYTES, "Q"]),
        (messages([{"type": "image_url", "image_url": CAT}, TEXT], "A"), [CAT_BYTES, "Q"]),
        ({"prompt": "<image>Q", "completion": "A", "images": [CAT]}, [CAT_BYTES, "Q"]),
        (
            {"texts": [{"user": "Q", "assistant": "A"}], "images": [CAT, DOG]},
            [CAT_BYTES, DOG_BYTES, "Q"],
        ),
        ({"question": "Q", "answer": "A", "images": [CAT, DOG]}, [CAT_BYTES, " ", DOG_BYTES, " Q"]),
        ({"question": "Q<image>", "answer": "A", "images": [CAT]}, ["Q", CAT_BYTES]),
        ({"context": "Q", "answers": ["A", "B"], "image": CAT}, [CAT_BYTES, " Q"]),
        ({"question": "Q", "answers": "A", "image": CAT, "id": 3}, [CAT_BYTES, " Q"]),
        ({"caption": "A", "image": CAT}, [CAT_BYTES]),
    ],
    ids=str,
)
def test_a_question_and_its_answer(folder, record, expected):
    assert said(read(folder, record).messages) == [("user", expected), ("assistant", ["A"])]


@pytest.mark.parametrize("text", ["Q<image>", "Q\n<image>\n", " <image> Q", "<image>\nQ", "Q"])
def test_the_single_image_of_the_first_llava_turn_comes_first(folder, text):
    sample = read(folder, llava(text, "A", "more", "B", image=CAT))
    assert said(sample.messages[:1]) == [("user", [CAT_BYTES, "\nQ"])]


def test_the_single_image_of_a_later_turn_stays(folder):
    sample = read(folder, llava("Q", "A", "this <image> ?", "B", image=CAT))
    assert said(sample.messages)[2] == ("user", ["this ", CAT_BYTES, " ?"])


def test_several_turns_with_a_system_message(folder):
    turns = [("system", "brief"), ("human", "Q"), ("gpt", "A"), ("user", "<image>"), ("assistant", "")]
    expected = [
        ("system", ["brief"]),
        ("user", ["Q"]),
        ("assistant", ["A"]),
        ("user", [CAT_BYTES]),
        ("assistant", []),
    ]
    one = {"conversations": [{"from": role, "value": text} for role, text in turns], "image": CAT}
    two = {"messages": [{"role": role, "content": text} for role, text in turns[1:]], "system": "brief"}
    for record in (one, two | {"image": CAT}):
        sample = read(folder, record | {"id": "7"})
        assert said(sample.messages) == expected
        assert sample.metadata == {"id": "7"}
        assert sample.origin == f"{folder / 'data.jsonl'}, line 1"


def test_weights(folder):
    turns = messages("Q", "A", "R", "B", "S", "C")
    turns["messages"][1]["loss"] = False
    turns["messages"][3]["weight"] = 0.5
    turns["messages"][4]["loss"] = False  # of the user: nothing that would be learned
    assert [m.weight for m in read(folder, turns).messages] == [1, 0, 1, 0.5, 1, 1]


def test_answers_within_a_prompt_are_not_learned(folder):
    record = {
        "prompt": messages("Q", "A", "R")["messages"],
        "completion": [{"role": "assistant", "content": "B"}],
    }
    assert [message.weight for message in read(folder, record).messages] == [1, 0, 1, 1]


def test_a_prompt_beside_messages_is_metadata(folder):
    sample = read(folder, messages("Q", "A", prompt="Q", prompt_id="7"))
    assert said(sample.messages) == [("user", ["Q"]), ("assistant", ["A"])]
    assert sample.metadata == {"prompt": "Q", "prompt_id": "7"}


def test_parts_take_the_images_of_their_indices(folder):
    second, first = ({"type": "image", "index": index, "text": None} for index in (1, 0))
    sample = read(
        folder, messages([second, {"type": "text", "text": "Q"}, first], "A", images=[CAT, DOG])
    )
    assert said(sample.messages)[0] == ("user", [PIXELS[DOG], "Q", PIXELS[CAT]])


@pytest.mark.parametrize("name", ["12:30:59.png", "a b%20c.png", "frame:1.png", "#?.png"])
def test_names_of_files_are_read_as_they_are(folder, name):
    (folder / name).write_bytes(PIXELS[CAT])
    for url in (
        name,
        str(folder / name),
        (folder / name).as_uri(),
        f"file://localhost{folder}/{quote(name)}",
    ):
        assert read(folder, llava("<image>Q", "A", image=url)).images[0].read() == PIXELS[CAT]


def test_cauldron_has_a_source(folder):
    texts = [
        {"user": "Q", "assistant": "A", "source": "S"},
        {"user": "R", "assistant": "B", "source": "S"},
    ]
    sample = read(folder, {"texts": texts, "images": [CAT]})
    assert said(sample.messages)[2:] == [("user", ["R"]), ("assistant", ["B"])]
    assert sample.metadata == {"source": "S"}


@pytest.mark.parametrize(
    "answers", [["A", "B"], [{"answer": "A", "answer_id": 1}, {"answer": "B", "answer_id": 2}]], ids=str
)
def test_all_answers_are_in_the_metadata(folder, answers):
    sample = read(folder, {"question": "Q", "answers": answers, "image": CAT, "id": 3})
    assert sample.metadata == {"answers": ["A", "B"], "id": 3}
    assert sample.answer == "A"


@pytest.mark.parametrize("answers", [[{"text": "A"}], ["A", 3], [["A"]], 3], ids=str)
def test_answers_are_texts(folder, answers):
    with pytest.raises(ValueError, match="answers must be a text or a list of texts, got "):
        read(folder, {"question": "Q", "answers": answers, "image": CAT})


def test_a_question_without_answer_is_a_prompt(folder):
    sample = read(folder, {"question": "Q", "kind": "k"})
    assert sample.answer is None
    assert sample.metadata == {"kind": "k"}
    assert read(folder, {"question": "Q"}).metadata == {"kind": "question"}


def test_videos(folder):
    (folder / "a.mp4").write_bytes(b"frames")
    for record in (
        llava("<video>\nQ", "A", video="a.mp4"),
        llava("Q\n<image>", "A", video="a.mp4"),  # as in LLaVA-Video
        messages("<video>\nQ", "A", videos=["a.mp4"]),
    ):
        (video,) = read(folder, record).media
        assert video == Media(folder / "a.mp4", modality="video")
    both = read(folder, messages("<video><image>Q", "A", videos=["a.mp4"], images=[CAT]))
    assert [media.modality for media in both.media] == ["video", "image"]
    assert both.images[0].read() == CAT_BYTES


def test_the_root_of_images(folder):
    record = llava(*QA, image="below/a.jpg")
    assert read(folder, record).images[0].path == folder / "below/a.jpg"
    assert read(folder, record, image_root="/root").images[0].path.as_posix() == "/root/below/a.jpg"


@pytest.mark.parametrize(
    ("record", "complaints"),
    [
        (llava("<image>Q", "A"), ["has <image> 1 times, but there are 0 images"]),
        (llava("<image>Q", "A", image=[CAT, DOG]), ["has <image> 1 times, but there are 2 images"]),
        (llava("Q", "A", image=[CAT, DOG]), ["has <image> 0 times, but there are 2 images"]),
        (llava("<image><image>Q", "A", image=CAT), ["has <image> 2 times, but there are 1 images"]),
        (messages([IMAGE, TEXT], "A"), ["has <image> 1 times, but there are 0 images"]),
        (llava("<image>", "A", "<image>", video="v"), ["has <video> 2 times, but there are 1 videos"]),
        (messages("<image>Q", "A", videos=["v"]), ["has <image> 1 times, but there are 0 images"]),
        (messages("<video>Q", "A"), ["has <video> 1 times, but there are 0 videos"]),
        (llava(), ["the conversation is empty"]),
        (
            {"conversations": [{"from": "gpt", "value": "A"}]},
            ["message 1 is an answer without question"],
        ),
        (llava("Q", "A", "<image>", image=CAT) | {"images": [CAT]}, ["both fields image and images"]),
        ({"conversations": "Q"}, ["conversations must be a list of messages, got 'Q'"]),
        ({"conversations": ["Q"]}, ["message 1 of conversations: expected an object, got 'Q'"]),
        (
            {"conversations": [{"from": "robot", "value": "<image>"}, {"from": "gpt", "value": 3}]},
            ["unknown role 'robot'; there are system, user", "value must be a text .* got 3"],
        ),
        (
            {"messages": [*messages("Q", "A")["messages"], {"role": "system", "content": "S"}]},
            ["message 3 is of the system, which can only be the first"],
        ),
        ({"messages": [{"role": "system", "content": "S"}]}, ["no message of the user"]),
        ({"messages": [{"role": "user"}]}, ["expected one of content and value, got none"]),
        (messages([{"type": "file"}], "A"), ["unknown part {'type': 'file'}; there are text, image, "]),
        (
            messages([{"type": "image_url", "image_url": {"url": "https://a.org/b.png"}}], "A"),
            ["'https://a.org/b.png' would have to be downloaded"],
        ),
        (llava(*QA, image="http://a.org/b.png"), ["'http://a.org/b.png' would have to be downloaded"]),
        (llava(*QA, image=7), ["image must be a path, bytes or a struct of bytes and path, got 7"]),
        (
            {"messages": [{"role": "user", "content": "Q", "loss": True}]},
            ["loss is True, but only the assistant's messages are learned"],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A", "loss": -1},
                ]
            },
            ["loss must be true, false or a number from 0, got -1"],
        ),
        (
            {"messages": [{"role": "user", "content": "Q", "tool_calls": [{}]}]},
            ["tool_calls cannot be trained on"],
        ),
        (messages("Q", "A") | llava("Q", "A"), ["fields of the formats llava and messages"]),
        ({"question": "Q", "messages": []}, ["fields of the formats messages and question"]),
        ({"texts": [{"user": "Q"}]}, ["text 1 needs assistant as texts"]),
        ({"texts": []}, ["the conversation is empty"]),
        (
            {"question": "Q", "anser": "A"},
            ["unknown field anser; there are question, answer, images, kind"],
        ),
        ({"question": "Q", "kind": "all"}, ['kind "all" means the questions of every kind']),
        ({"question": 3}, ["question must be a text, got 3"]),
        ({"question": "", "kind": 3}, ["kind must be a text, got 3", "the field question is missing"]),
        ({"id": 3}, ["the field .* is missing; there are id"]),
        (messages("Q", "A", prompt="Q", completion="A"), ["both messages and completion"]),
        (
            messages(
                [{"type": "image", "index": 2}, {"type": "image", "index": 0}], "A", images=[CAT, DOG]
            ),
            [r"the parts of 2 images must have each index from 0 once, got \[2, 0\]"],
        ),
        (
            messages([{"type": "image", "index": "0"}], "A", image=CAT),
            ["index must be an integer from 0"],
        ),
        (llava("<image>Q", "A", image="a\0.png"), ["is no path"]),
    ],
    ids=str,
)
def test_problems_of_a_record_are_one_error(folder, record, complaints):
    good = record if "id" in record else {}
    name = next((n for n in ("messages", "texts", "question") if n in record), "conversations")
    good = {
        "messages": messages("Q", "A"),
        "texts": {"texts": [{"user": "Q", "assistant": "A"}]},
        "question": {"question": "Q"},
        "conversations": llava("Q", "A"),
    }[name]
    file = write_lines(folder / "data.jsonl", [good, record, good])
    samples = read_samples(file)
    assert len(samples) == 3
    assert samples[2].messages
    with pytest.raises(DataError, match=f"^{re.escape(str(file))}, line 2: ") as raised:
        samples[1]
    for complaint in complaints:
        assert re.search(complaint, str(raised.value)), raised.value
    assert str(raised.value).count("; ") >= len(complaints) - 1


def test_a_format_by_name(folder):
    record = {"question": "Q", "answer": "A", "id": 3, "caption": "C"}
    sample = read(folder, record, format="vqa")
    assert said(sample.messages) == [("user", ["Q"]), ("assistant", ["A"])]
    assert sample.metadata == {"answers": ["A"], "id": 3, "caption": "C"}
    with pytest.raises(
        ConfigError, match="format must be auto, llava, messages, texts, .* got 'sharegpt'"
    ):
        read(folder, record, format="sharegpt")


def test_an_unknown_format_lists_the_formats(folder):
    with pytest.raises(
        DataError, match=r"no known format \(fields of the first: a, b\).*llava: conversations"
    ):
        read(folder, {"a": 1, "b": 2})
    with pytest.raises(DataError, match=r"no record that can be read \(no objects\)"):
        read_samples(write_lines(folder / "data.jsonl", [[3]]))
    (folder / "data.jsonl").write_text('[3]\n{"messages": [')
    with pytest.raises(DataError, match=r"no record that can be read \(line 2: Expecting value"):
        read_samples(folder / "data.jsonl")


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("iVBORw0KGgo" * 500, r"'iVBORw0KGgo.*'\.\.\. is no path; put data:image/\.\.\.;base64, before"),
        ([137] * 1000, "got 137; image must be a path.*; and 991 more"),
    ],
    ids=["base64", "numbers"],
)
def test_an_image_in_a_wrong_field_does_not_fill_the_message(folder, image, complaint):
    with pytest.raises(DataError, match=complaint) as raised:
        read(folder, llava("Q", "A", image=image))
    assert len(str(raised.value)) < 1000


def test_a_question_beside_its_context_is_refused(folder):
    with pytest.raises(DataError, match="there are both question and context; keep one"):
        read(folder, {"question": "Q", "context": "C", "answers": ["A"]})
