import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfuse.data import Message, Sample
from torchfuse.tasks.metrics import (
    anls,
    contained,
    exact_match,
    normalize_answer,
    references,
    vqa_accuracy,
)

ANSWERS = ("cat", "a Cat.", "two", "2", "dog", "the dog!", "isnt", "isn't")
MEANINGS = ("cat", "cat", "2", "2", "dog", "dog", "isn't", "isn't")  # as the official script has them


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes", "yes"),
        ("The  an a CAT", "cat"),
        ("none", "0"),
        ("Ten men", "10 men"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),  # without both apostrophes it is in no list
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("Im", "im"),
        ("lets", "lets"),
        ("red/white", "red white"),
        ("red /white", "red white"),
        ("red/ white", "red white"),
        ("red - white-ish", "red whiteish"),  # beside a space once, a mark is removed everywhere
        ("1,000-2", "10002"),
        ("1,x", "1 x"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        (".5.", ".5"),
        ("what?\n\t", "what"),
        ("", ""),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(answer, normalised):
    assert normalize_answer(answer) == normalised


@given(st.lists(st.integers(0, 7), min_size=4, max_size=10), st.integers(0, 7))
def test_vqa_accuracy_is_the_mean_over_all_choices_of_the_other_annotators(answers, predicted):
    expected = [
        min(1, sum(MEANINGS[each] == MEANINGS[predicted] for each in others) / 3)
        for others in itertools.combinations(answers, len(answers) - 1)
    ]
    got = vqa_accuracy(ANSWERS[predicted], [ANSWERS[each] for each in answers])
    assert got == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_of_ten_answers(matches, accuracy):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_accuracy("Yes", answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answers", "accuracy"), [(["a cat"], 1), (["cat"] * 2, 1), (["cat"] * 3, 1), (["dog"] * 3, 0)]
)
def test_few_answers_that_agree_are_enough(answers, accuracy):
    assert vqa_accuracy("Cat", answers) == accuracy


@functools.cache
def distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return distance(a[1:], b[1:])
    return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))


@given(st.text("abé", max_size=7), st.lists(st.text("abé", max_size=7), min_size=1, max_size=3))
def test_anls_is_that_of_the_definition(text, answers):
    similarities = [1 - distance(text, each) / max(len(text), len(each), 1) for each in answers]
    best = max(similarities)
    assert anls(text.upper(), answers) == pytest.approx(best if best >= 0.5 else 0)


@pytest.mark.parametrize(
    ("text", "answers", "similarity"),
    [
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["a"], 0.5),
        ("abc", ["a"], 0),
        ("10  Downing\nStreet ", ["10 downing street"], 1),
        ("", ["a"], 0),
        ("", [""], 1),
        ("a", [], 0),
    ],
)
def test_anls(text, answers, similarity):
    assert anls(text, answers) == pytest.approx(similarity)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It is a cat.", "cat", True),
        ("It is a CAT!", "the cat", True),
        ("It is a catalogue.", "cat", False),
        ("It is a bobcat", "cat", False),
        ("red-brown", "Red brown", True),
        ("the brown and red one", "brown red", False),
        ("Answer: B", "b", True),
        ("It is a cat", "A", True),  # an answer of an article alone is looked for with them
        ("It is one cat", "A", False),
        ("That costs $1,250.50.", "1250.50", True),
        ("That costs 3.5", "3", False),
        ("version 3.", "3", True),
        ("C'est «l\u2019été».", "l\u2019été", True),
        ("नमस्ते दुनिया", "नमस्ते", True),
        ("नमस्ते", "नम", False),
        ("I like 🍕!", "🍕", True),
        ("I like it!", "🍕", False),
        ("anything", "", False),
    ],
)
def test_contained(text, answer, found):
    assert contained(text, [answer]) == found
    assert contained(text, ["nothing", answer]) == found


def test_exact_match_takes_any_reference():
    assert exact_match(" a\ncat", ["dog", "a cat"]) == 1
    assert exact_match("a cat.", ["dog", "a cat"]) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["one"]),
        (["two", "three"], ["two", "three"]),
        ([], ["one"]),
        ("two", ["one"]),
        (["two", 3], ["one"]),
        ([{"answer": "two"}], ["one"]),
    ],
)
def test_references(given, expected):
    messages = [Message("user", ["how many?"]), Message("assistant", ["one"])]
    assert references(Sample(messages, {} if given is None else {"answers": given})) == expected
    assert references(Sample(messages[:1])) == []
