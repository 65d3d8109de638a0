"""Metrics of an answer against one or more reference answers, each from 0 to 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from torchfuse.data.samples import Sample

__all__ = [
    "METRICS",
    "Metric",
    "anls",
    "contained",
    "exact_match",
    "normalize_answer",
    "references",
    "vqa_accuracy",
]

Metric = Callable[[str, Sequence[str]], float]
"""Score a text against reference answers."""

_ARTICLES: Final = frozenset(("a", "an", "the"))
_COMMA_IN_NUMBER: Final = re.compile(r"(?<=\d),(?=\d)")
_OTHER_POINT: Final = re.compile(r"(?<!\d)\.|\.(?!\d)")
_MATCHES: Final = 3  # annotators whose agreement makes an answer right
_THRESHOLD: Final = 0.5  # similarities below it count as 0
_VQA_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_VQA_PERIOD: Final = re.compile(r"\.(?!\d)")
_VQA_COMMA: Final = re.compile(r"\d,\d")
_VQA_NUMBERS: Final = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_VQA_CONTRACTIONS: Final = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't "
    "mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've "
).split()
# Without one of its apostrophes a contraction means the same.
_VQA_SPELLINGS: Final = {
    word[:index] + word[index + 1 :]: word
    for word in _VQA_CONTRACTIONS
    for index, letter in enumerate(word)
    if letter == "'"
}


def references(sample: Sample) -> list[str]:
    """Return the reference answers of a sample.

    They are ``answers`` of its metadata, where that is a list of texts; otherwise its last answer, if it
    has one.

    Examples:
        >>> from torchfuse.data import Message
        >>> messages = [Message("user", ["Which?"]), Message("assistant", ["A cat."])]
        >>> references(Sample(messages)), references(Sample(messages, {"answers": ["cat", "a cat"]}))
        (['A cat.'], ['cat', 'a cat'])
    """
    given = sample.metadata.get("answers")
    if isinstance(given, list) and given and all(isinstance(answer, str) for answer in given):
        return given
    return [] if sample.answer is None else [sample.answer]


def exact_match(text: str, answers: Sequence[str]) -> float:
    """Return 1 if a text is one of the answers, word for word.

    Examples:
        >>> exact_match("a  cat ", ["a cat", "cat"]), exact_match("A cat", ["a cat", "cat"])
        (1.0, 0.0)
    """
    return float(text.split() in [answer.split() for answer in answers])


def contained(text: str, answers: Sequence[str]) -> float:
    """Return 1 if one of the answers occurs in a text, as whole words.

    Case, articles and punctuation are ignored, apart from points within numbers. An answer that has
    nothing else must occur with them.

    Examples:
        >>> contained("It is a red-brown cat.", ["The cat"]), contained("A catalogue.", ["cat"])
        (1.0, 0.0)
        >>> contained("13.5 kg", ["13"]), contained("13,500 kg", ["13500"])
        (0.0, 1.0)
    """
    return float(any(_occurs(answer, text) for answer in answers))


def _occurs(answer: str, text: str) -> bool:
    part, whole = _words(answer), _words(text)
    if not part:
        return bool(answer.strip()) and answer.strip() in text
    if others := _without_articles(part):
        part, whole = others, _without_articles(whole)
    starts = range(len(whole) - len(part) + 1)
    return any(whole[start : start + len(part)] == part for start in starts)


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case; punctuation and symbols separate them."""
    text = _OTHER_POINT.sub(" ", _COMMA_IN_NUMBER.sub("", text.casefold()))
    letters = (x if x == "." or unicodedata.category(x)[0] not in "PS" else " " for x in text)
    return "".join(letters).split()


def _without_articles(words: list[str]) -> list[str]:
    return [word for word in words if word not in _ARTICLES]


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQAv2: the share of three annotators who gave the same answer.

    It is the mean of ``min(1, matches / 3)`` over all choices of all annotators but one, after VQAv2's
    normalisation. With fewer than four answers, all of the others must match in place of three; a single
    answer must match itself.

    Examples:
        >>> answers = ["2"] * 2 + ["three"] * 8
        >>> vqa_accuracy("3", answers), round(vqa_accuracy("Two.", answers), 4)
        (1.0, 0.6)
        >>> vqa_accuracy("two", ["2"])
        1.0
    """
    given = [normalize_answer(answer) for answer in answers]
    matches, others = given.count(normalize_answer(text)), len(given) - 1
    if others < 1:
        return float(matches)
    needed = min(_MATCHES, others)
    # The annotator who is left out is one of those who match, or one of the rest.
    among = matches * min(1, (matches - 1) / needed) + (len(given) - matches) * min(1, matches / needed)
    return among / len(given)


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without articles and punctuation, numbers up to ten as digits.

    This is the normalisation of VQAv2's evaluation (Goyal et al., https://arxiv.org/abs/1612.00837),
    with one difference: the official script leaves answers as they are where all annotators gave the
    same one, so that "Yes" is wrong where all answers are "yes". Here, as in TextVQA's evaluation and
    in lmms-eval, every answer is normalised. Punctuation beside a space is removed, and so is all of it
    in a text with a comma in a number; other punctuation becomes a space.

    Examples:
        >>> normalize_answer("The Two dogs."), normalize_answer("black/white"), normalize_answer("1,000")
        ('2 dogs', 'black white', '1000')
        >>> normalize_answer("it isnt 3.5 !")
        "it isn't 3.5"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = _VQA_COMMA.search(text)
    text = text.translate(
        {
            ord(mark): "" if in_number or f"{mark} " in text or f" {mark}" in text else " "
            for mark in _VQA_PUNCTUATION
        }
    )
    words = [_VQA_NUMBERS.get(word, word) for word in _VQA_PERIOD.sub("", text).lower().split()]
    return " ".join(_VQA_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def anls(text: str, answers: Sequence[str]) -> float:
    """Return DocVQA's similarity: 1 less the edit distance, normalised, to the nearest answer.

    The distance is divided by the length of the longer text; case and repeated spaces are ignored. As in
    the official evaluation, a similarity below one half is 0. The mean over questions is the average
    normalized Levenshtein similarity (ANLS, Biten et al., https://arxiv.org/abs/1905.13648).

    Examples:
        >>> anls("Helo", ["hello"]), anls("hello", ["goodbye", "Hello"]), anls("cat", ["dog"])
        (0.8, 1.0, 0.0)
    """
    similarity = max((_similarity(_plain(text), _plain(answer)) for answer in answers), default=0.0)
    return similarity if similarity >= _THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    return 1 - _edit_distance(a, b) / longest if longest else 1.0


def _edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance of two texts, row by row of its table."""
    codes = np.array([ord(letter) for letter in b], dtype=np.int64)
    columns = np.arange(len(b) + 1)
    row = columns
    for number, letter in enumerate(a, 1):
        replaced = row[:-1] + (codes != ord(letter))
        row = np.concatenate([[number], np.minimum(row[1:] + 1, replaced)])
        # Insertions: the least of all entries to the left, each a step further away.
        row = np.minimum.accumulate(row - columns) + columns
    return int(row[-1])


METRICS: Final[Mapping[str, Metric]] = {
    metric.__name__: metric for metric in (exact_match, contained, vqa_accuracy, anls)
}
