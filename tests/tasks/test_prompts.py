import json

import pytest
from prompt_settings import images, sample, transform

from torchfuse.data import Message, Sample
from torchfuse.data.templates import ChatTemplate, text_template
from torchfuse.errors import DataError
from torchfuse.tasks.prompt_lengths import encode_turn, longest_answer, prompt_lengths, turn_lengths
from torchfuse.tasks.prompts import Prompt, load_samples, prompts_from, user_message


def test_questions_and_conversations(tmp_path):
    a, b, _ = images(tmp_path).values()
    records = [
        {"question": "<image> w4", "images": ["a.png"]},
        {
            "system": "w5",
            "turns": [{"question": "w6", "images": ["a.png", "b.png"]}, {"question": "w7"}],
        },
        {"turns": [{"question": "w8"}]},
    ]
    assert prompts_from(records, tmp_path / "p.yaml") == [
        Prompt((user_message("<image> w4", (a,)),)),
        Prompt((user_message("<image> <image> w6", (a, b)), user_message("w7")), "w5"),
        Prompt((user_message("w8"),)),
    ]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"questin": "w4"},
            "prompt 1: unknown field questin; there are question, answer, images, kind",
        ),
        ({"questin": "w4"}, "the field question is missing"),
        ({"question": "w4", "images": ["none.png"]}, "prompt 1: The image .*none.png cannot be opened"),
        ({"question": "<image> w4"}, "prompt 1: the conversation has <image> 1 times, but there are 0"),
        ({"question": "<image> w4", "images": ["a.png"] * 2}, "<image> 1 times, but there are 2 images"),
        ({"question": "w4", "images": [5]}, "image must be a path, bytes or a struct .*, got 5"),
        ({"question": 5}, "question must be a text, got 5"),
        ({"turns": []}, r"prompt 1: turns must be a list of questions with their images, got \[\]"),
        ({"turns": "w4"}, "turns must be a list of questions with their images, got 'w4'"),
        ({"turns": ["w4"]}, r"turns must be a list .*, got \['w4'\]"),
        ({"system": "w4"}, "turns must be a list of questions with their images, got None"),
        (
            {"turns": [{"question": "w4"}], "images": []},
            "unknown key images; a conversation has system, turns",
        ),
        ({"turns": [{"question": "w4"}], "system": 5}, "system must be a text without <image>, got 5"),
        (
            {"turns": [{"question": "w4"}], "system": None},
            "system must be a text without <image>, got None",
        ),
        ({"turns": [{"question": "w4"}], "system": "<image>"}, "system must be a text without <image>"),
        ({"turns": [{"question": "w4"}, {"questio": "w4"}]}, "prompt 1, turn 2: unknown field questio"),
        (
            {"turns": [{"question": "w", "images": ["x.png"]}]},
            "prompt 1, turn 1: The image .*x.png cannot",
        ),
    ],
    ids=str,
)
def test_each_problem_of_a_prompt_is_named(tmp_path, record, problem):
    images(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/p\.yaml.*{problem}"):
        prompts_from([record], tmp_path / "p.yaml")


def test_all_problems_are_one_error(tmp_path):
    images(tmp_path)
    (tmp_path / "b.png").write_text("no image")
    records = [
        {"question": "w4", "images": ["b.png"]},
        {"question": "w4", "images": ["a.png"]},
        {
            "system": 5,
            "turns": [{"question": "w4", "images": ["b.png", "x.png"]}, {"question": "<image>"}],
        },
        {"quest": "w4"},
    ]
    with pytest.raises(ValueError, match=r"p\.yaml has 6 problems:") as info:
        prompts_from(records, tmp_path / "p.yaml")
    places = [line.split(": ")[0].strip() for line in str(info.value).splitlines()[1:]]
    assert places == [
        "prompt 1",
        "prompt 3, turn 1",
        "prompt 3, turn 1",
        "prompt 3, turn 2",
        "prompt 3",
        "prompt 4",
    ]
    with pytest.raises(ValueError, match=r"has 30 problems:(\n.*){16}\n  and 14 more$"):
        prompts_from([{"quest": "w4"}] * 30, tmp_path / "p.yaml")


@pytest.mark.parametrize("records", [None, [], {"question": "w4"}, ["w4"], "w4"], ids=str)
def test_a_file_that_holds_no_list_of_prompts(tmp_path, records):
    with pytest.raises(ValueError, match=r"p\.yaml must hold a list of prompts, each with a question"):
        prompts_from(records, tmp_path / "p.yaml")


def ids_of_turns(made, prompt):
    """The ids of each turn, after answers that ended."""
    messages, ids = [Message("system", [prompt.system])], []
    for index, turn in enumerate(prompt.turns):
        messages.append(turn)
        ids.append(encode_turn(made, messages, first=not index))
        messages.append(Message("assistant", ["w11"]))
    return ids


def test_turns_are_one_sequence_with_one_bos(tmp_path):
    picture = images(tmp_path)["a"]
    prompt = Prompt((user_message("<image> w4", (picture,)), user_message("w5 w6")), "w7")
    template = text_template("{text} w8 ", "w9 {text}")
    made = transform(tmp_path, "all").with_template(template)
    assert ids_of_turns(made, prompt) == [[1, 7, 8, 9, 37, 4], [9, 5, 6]]
    assert turn_lengths(made, [prompt], path="p") == [[6, 4]]  # with an end before the second
    for plain in (
        transform(tmp_path, "placeholder"),
        transform(tmp_path, "placeholder", template="plain"),
    ):
        assert ids_of_turns(plain, prompt) == [[1, 7, 37, 37, 4], [5, 6]]
    changing = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}w20{{ ' w21' * loop.last }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}",
        name="changing",
    )
    whole = transform(tmp_path, "all").with_template(changing)  # the second turn is all of it
    assert turn_lengths(whole, [prompt], path="p") == [[3, 1 + 2 + 1 + 2 + 1]]
    with_header = transform(tmp_path, "all", template="vicuna")
    assert ids_of_turns(with_header, prompt)[1] == with_header.prompt([user_message("w5 w6")])[1:]


@pytest.mark.parametrize(
    "text", ["w4", "{text} {text}", "<image> {text}", ""], ids=["none", "two", "image", "empty"]
)
def test_texts_of_a_template_that_cannot_be_used(text):
    with pytest.raises(
        ValueError, match=r"template\.system must hold \{text\} once and no <image>.*; temp"
    ):
        text_template(text, text)


@pytest.mark.parametrize(
    "text",
    ["{text}", "QUESTION: {text} SYSTEM", "'{text}\"\n", "\\ {{{text}}} {%- {# 猫🐈 {text", "\\n{text}"],
)
def test_texts_of_a_template_are_taken_as_they_are(tmp_path, text):
    made = transform(tmp_path, "all", template=text_template(f"{text}QUESTION", text))
    rendered = made.template.prompt([Message("user", ["w4"])], made.tokenizer)
    assert rendered == text.replace("{text}", "w4") + made.tokenizer.boundary


def test_the_default_texts_are_the_template_plain(tmp_path):
    messages = [Message("system", ["w5"]), Message("user", ["w4 w6"]), Message("assistant", ["w7"])]
    plain = transform(tmp_path, "all", template="plain")
    texts = transform(tmp_path, "all", template=text_template())
    messages += [Message("user", ["w8"])]
    assert plain.prompt(messages) == texts.prompt(messages)
    assert plain.next_turn(messages, ended=False) == texts.next_turn(messages, ended=False)
    assert plain.stop_tokens == texts.stop_tokens


def test_turns_that_cannot_be_encoded_are_one_error(tmp_path):
    picture, encode = images(tmp_path)["a"], transform(tmp_path, "prefix")
    encode.max_seq_len = 4
    prompts = [
        Prompt((user_message("w4 w5 w6 w7"),)),
        Prompt((user_message("w4", (picture,)), user_message("w4", (picture,)), user_message(" "))),
    ]
    with pytest.raises(ValueError, match="^p has 3 problems:") as info:
        turn_lengths(encode, prompts, path="p")
    first, second, third = str(info.value).splitlines()[1:]
    assert "prompt 1: The question 'w4 w5 w6 w7' is 5 tokens long" in first
    assert 'prompt 2, turn 2: with layout "prefix" images come in front' in second
    assert third == "  prompt 2, turn 3: the tokenizer makes no token of ' '."


def test_samples_that_cannot_be_encoded_are_one_error(tmp_path):
    made = transform(tmp_path, "all", max_seq_len=4)
    samples = [
        sample("w4", answer="w5 w6 w7"),
        Sample(sample("w4 w5 w6 w7", answer="w8").messages, origin="f.jsonl, line 2"),
        sample("w4"),
        sample("w4", answer="w5"),
    ]
    with pytest.raises(DataError, match=r"^f\.jsonl, line 2: The question 'w4 w5 w6 w7' is 5 tokens"):
        prompt_lengths(made, samples)
    with pytest.raises(DataError, match=r"^f\.jsonl has 3 problems:") as info:
        longest_answer(made, samples, "f.jsonl")
    first, second, third = str(info.value).splitlines()[1:]
    assert first == "  The sample is 6 tokens long with its answer, and max_seq_len is 4."
    assert second.startswith("  line 2 is 7 tokens long")
    assert third == "  The sample has no answer."
    assert longest_answer(made, samples[3:]) == 2
    assert longest_answer(made, []) == 1


def test_every_row_and_image_that_is_wrong_is_named(tmp_path):
    images(tmp_path)
    (tmp_path / "b.png").write_text("no image")
    records = [
        {"question": "w4", "images": ["a.png"]},
        {"question": "<image>"},
        {"question": "w4", "images": ["b.png", "none.png"]},
        {"question": "w5"},
        {"question": "w6", "images": ["b.png"]},
    ]
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=rf"^{file} has 4 problems:") as info:
        load_samples(file)
    lines = str(info.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["line 2", "line 3", "line 3", "line 5"]
    assert "has <image> 1 times, but there are 0 images" in lines[0]
    assert "b.png is no image" in lines[1]
    assert "none.png cannot be opened" in lines[2]
    file.write_text(json.dumps(records[0]) + "\n")
    [loaded] = load_samples(file)
    assert loaded.messages == [user_message("w4", [tmp_path / "a.png"])]
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"other/a\.png cannot be opened"):
        load_samples(file, image_root=tmp_path / "other")
