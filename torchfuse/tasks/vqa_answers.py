"""The normalisation of answers in the evaluation of VQAv2 (Goyal et al., https://arxiv.org/abs/1612.00837).

It is that of the official evaluation, with one difference: the official script leaves answers as they
are where all annotators gave the same one, so that "Yes" is wrong where all answers are "yes". Here, as
in the evaluation of TextVQA and in lmms-eval, every answer is normalised.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["normalize_answer"]

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD: Final = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_ARTICLES: Final = frozenset(("a", "an", "the"))
_NUMBERS: Final = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_CONTRACTIONS: Final = (
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
_SPELLINGS: Final = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS
    for index, letter in enumerate(word)
    if letter == "'"
}


def normalize_answer(text: str) -> str:
    """Return an answer in lower case, without articles and punctuation, numbers up to ten as digits.

    Punctuation beside a space is removed, and so is all of it in a text with a comma in a number; other
    punctuation becomes a space.

    Examples:
        >>> normalize_answer("The Two dogs."), normalize_answer("black/white"), normalize_answer("1,000")
        ('2 dogs', 'black white', '1000')
        >>> normalize_answer("it isnt 3.5 !")
        "it isn't 3.5"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = _COMMA_IN_NUMBER.search(text)
    text = text.translate(
        {
            ord(mark): "" if in_number or f"{mark} " in text or f" {mark}" in text else " "
            for mark in _PUNCTUATION
        }
    )
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)
