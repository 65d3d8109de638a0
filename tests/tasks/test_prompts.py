import pytest
from prompt_settings import images, transform

from torchfuse.data.questions import Question
from torchfuse.tasks.prompts import Prompt, Template, encode_turns, prompts_from


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
        Prompt((Question("<image> w4", (a,)),)),
        Prompt((Question("<image> <image> w6", (a, b)), Question("w7")), "w5"),
        Prompt((Question("w8"),)),
    ]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            {"questin": "w4"},
            "prompt 1: unknown field questin; there are question, answer, images, kind.",
        ),
        ({"questin": "w4"}, "the field question is missing"),
        ({"question": "w4", "images": ["none.png"]}, "prompt 1: The image .*none.png cannot be opened"),
        ({"question": "<image> w4"}, "prompt 1: the question has <image> 1 times, but there are 0"),
        ({"question": "<image> w4", "images": ["a.png"] * 2}, "<image> 1 times, but there are 2 images"),
        ({"question": "w4", "images": "a.png"}, "images must be a list, got 'a.png'"),
        ({"question": 5}, "question must be a str, got 5"),
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


def test_turns_are_one_sequence_with_one_bos(tmp_path):
    picture = images(tmp_path)["a"]
    prompt = Prompt((Question("<image> w4", (picture,)), Question("w5 w6")), "w7")
    (turns,) = encode_turns(
        transform(tmp_path, "all"), Template("{text} w8 ", "w9 {text}"), [prompt], path="p"
    )
    assert turns == [[1, 7, 8, 9, 37, 4], [9, 5, 6]]
    (turns,) = encode_turns(transform(tmp_path, "placeholder"), Template(), [prompt], path="p")
    assert turns == [[1, 7, 37, 37, 4], [5, 6]]


def test_turns_that_cannot_be_encoded_are_one_error(tmp_path):
    picture, encode = images(tmp_path)["a"], transform(tmp_path, "prefix")
    encode.max_seq_len = 4
    prompts = [
        Prompt((Question("w4 w5 w6 w7"),)),
        Prompt((Question("w4", (picture,)), Question("w4", (picture,)), Question(" "))),
    ]
    with pytest.raises(ValueError, match="^p has 3 problems:") as info:
        encode_turns(encode, Template(), prompts, path="p")
    first, second, third = str(info.value).splitlines()[1:]
    assert "prompt 1: The question 'w4 w5 w6 w7' is 5 tokens long" in first
    assert 'prompt 2, turn 2: with layout "prefix" images come in front' in second
    assert third == "  prompt 2, turn 3: the tokenizer makes no token of ' '."
