"""Questions about images: question files, and the transform of a question to tokens and pixels.

A question file has a JSON object a line:

    {"question": "<image> which digit ?", "answer": "seven", "images": ["7.png"], "kind": "digit"}

``<image>`` marks the position of an image, once for each; without any, the images come first. Paths are
relative to the file. ``answer`` is needed for training and evaluation only; ``images`` may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform, open_image
from torchfuse.data.masks import ImageScope, image_mask
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import ConfigError, DataError

__all__ = [
    "Question",
    "QuestionDataset",
    "QuestionTransform",
    "check_questions",
    "image_problems",
    "name_problems",
    "question_from",
    "read_questions",
]

_MARKER: Final = "<image>"
_FIELDS: Final = {"question": str, "answer": str, "images": list, "kind": str}
_IGNORED: Final = -100
_LISTED: Final = 16  # problems of a file that are listed one by one


@dataclass(frozen=True)
class Question:
    """A question, its images and, if it is known, the answer."""

    question: str
    images: tuple[Path, ...] = ()
    answer: str | None = None
    kind: str = "question"

    def __post_init__(self) -> None:
        markers = self.question.count(_MARKER)
        if not markers and self.images:
            object.__setattr__(self, "question", f"{_MARKER} " * len(self.images) + self.question)
        elif markers != len(self.images):
            raise DataError(
                f"the question has {_MARKER} {markers} times, but there are {len(self.images)} images"
            )


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file, and check that every image in it opens.

    Raises:
        DataError: naming every line that is wrong, or if there is no question.
    """
    path = Path(path)
    questions, problems = [], []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The question file {path} cannot be read: {error}.") from error
    checked: dict[Path, str] = {}
    for number, line in enumerate(tqdm(lines, desc=f"check {path.name}", disable=None, leave=False), 1):
        if not line.strip():
            continue
        try:
            questions.append(_parse(line, path.parent))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        problems += [f"line {number}: {problem}" for problem in image_problems(questions[-1], checked)]
    if problems:
        raise DataError(name_problems(path, problems))
    if not questions:
        raise DataError(f"The question file {path} holds no question.")
    return questions


def image_problems(question: Question, checked: dict[Path, str]) -> list[str]:
    """Return what is wrong with the images of a question, opening each path once.

    Args:
        question: the question.
        checked: results of earlier calls by path, an empty string for an image that opens; updated.
    """
    for image in question.images:
        if image not in checked:
            try:
                open_image(image)
            except ValueError as error:
                checked[image] = str(error)
            else:
                checked[image] = ""
    return [checked[image] for image in dict.fromkeys(question.images) if checked[image]]


def name_problems(path: str | Path, problems: Sequence[str]) -> str:
    """Return one message for all problems of a file.

    Examples:
        >>> print(name_problems("a.jsonl", ["line 3: no JSON."]))
        a.jsonl, line 3: no JSON.
        >>> print(name_problems("a.jsonl", ["line 3: no JSON.", "line 5: no JSON."]))
        a.jsonl has 2 problems:
          line 3: no JSON.
          line 5: no JSON.
    """
    if len(problems) == 1:
        return f"{path}, {problems[0]}"
    more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n  ".join([f"{path} has {len(problems)} problems:", *problems[:_LISTED], *more])


def _parse(line: str, folder: Path) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got a {type(record).__name__}.")
    return question_from(record, folder)


def question_from(record: Mapping[str, Any], folder: Path) -> Question:
    """Return the question of a record of a question file, or of a prompt in a YAML file.

    Raises:
        DataError: naming every field that is missing, unknown or of the wrong type, or if markers and
            images differ in number.
    """
    problems = []
    unknown = sorted(set(map(str, record)) - set(_FIELDS))
    if unknown:
        problems.append(f"unknown field {', '.join(unknown)}; there are {', '.join(_FIELDS)}.")
    if not record.get("question"):
        problems.append("the field question is missing.")
    for name, kind in _FIELDS.items():
        missing = name == "question" and not record.get(name)
        if name in record and not missing and not isinstance(record[name], kind):
            problems.append(f"{name} must be a {kind.__name__}, got {record[name]!r}.")
    if record.get("kind") == "all":
        problems.append('kind "all" means the questions of every kind; choose another name.')
    images = record.get("images", [])
    if isinstance(images, list) and not all(isinstance(image, str) for image in images):
        problems.append(f"images must be paths, got {images!r}.")
    if problems:
        raise DataError(" ".join(problems))
    fields = {name: record[name] for name in ("question", "answer", "kind") if name in record}
    return Question(images=tuple(folder / image for image in images), **fields)


class QuestionTransform:
    """Transform of a question to tokens, labels, pixels and the mask between them.

    It takes the place of the tokenizer in a torchtune recipe.

    Args:
        tokenizer: directory of the language model, with its ``tokenizer.json``.
        image_token: id that marks images in the sequence; usually the first one after the pretrained
            vocabulary, for which ``fuse(..., fusion_vocab_size=1)`` adds a row. None only for
            ``layout="prefix"``.
        features_per_image: features of an image after encoder and adapter.
        image_transform: directory of the encoder, with its image processor, or an ``ImageTransform``
            of whole images.
        layout: the tokens of an image in the sequence. ``"marker"``: one ``image_token`` (for
            cross-attention); ``"placeholder"``: one for each feature; ``"prefix"``: none.
        scope: which images a token may attend to, see ``image_mask``; with ``"marker"``.
        max_seq_len: the longest sequence; a longer one is an error, never truncated.
        cache_images: how many images' pixels to keep in memory.

    Raises:
        ConfigError: if options contradict each other.
        CheckpointError: if a directory lacks its file.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        *,
        image_token: int | None,
        features_per_image: int,
        image_transform: str | Path | ImageTransform,
        layout: Literal["marker", "placeholder", "prefix"] = "marker",
        scope: ImageScope = "last",
        max_seq_len: int | None = None,
        cache_images: int = 0,
    ) -> None:
        if layout not in ("marker", "placeholder", "prefix"):
            raise ConfigError(f'layout must be "marker", "placeholder" or "prefix", got {layout!r}.')
        if (image_token is None) != (layout == "prefix"):
            raise ConfigError(
                f"image_token={image_token} does not fit layout={layout!r}: give None for the layout "
                '"prefix", and an id for the others.'
            )
        self.tokenizer = TextTokenizer(tokenizer)
        if isinstance(image_transform, ImageTransform):
            self.image_transform = image_transform
        else:
            self.image_transform = ImageTransform.from_directory(image_transform)
        if isinstance(self.image_transform, TiledImageTransform | GridImageTransform):
            raise ConfigError(
                f"image_transform is a {type(self.image_transform).__name__}, but every image of a "
                "question has the same number of features: give an ImageTransform of whole images."
            )
        self.image_token = image_token
        self.features_per_image = features_per_image
        self.markers_per_image = {"marker": 1, "placeholder": features_per_image, "prefix": 0}[layout]
        self.scope: ImageScope = scope if layout == "marker" else "all"
        self.max_seq_len = max_seq_len
        self.pixels = lru_cache(cache_images)(self._read_pixels)  # of an image's path, ``[3, h, w]``

    def _read_pixels(self, path: Path) -> Tensor:
        return self.image_transform(open_image(path))

    @property
    def pad_id(self) -> int:
        """Id that pads sequences."""
        return self.tokenizer.pad_id

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.tokenizer.eos_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the first stop token, without markers of images."""
        text = []
        for token in tokens:
            if token in self.stop_tokens:
                break
            if token != self.image_token:
                text.append(token)
        return self.tokenizer.decode(text)

    def __call__(self, question: Question, *, with_answer: bool = True) -> dict[str, Any]:
        """Encode a question.

        Args:
            question: the question.
            with_answer: whether to append the answer and EOS, with labels.

        Returns:
            ``tokens`` (list), ``images`` ``[m, 3, h, w]``, ``encoder_mask`` (bool ``[s, m * n]``) and,
            with the answer, ``labels`` (list, unshifted, -100 before the answer).

        Raises:
            DataError: if the answer is needed and missing, or the sequence is too long.
        """
        prompt, answer = self.encode(question, with_answer=with_answer)
        tokens = prompt + answer
        images = [self.pixels(path) for path in question.images]
        sides = self.image_transform.height, self.image_transform.width
        sample = {
            "tokens": tokens,
            "images": torch.stack(images) if images else torch.empty(0, 3, *sides),
            "encoder_mask": self.encoder_mask(tokens, len(images)),
        }
        if with_answer:
            sample["labels"] = [_IGNORED] * len(prompt) + answer
        return sample

    def encode(self, question: Question, *, with_answer: bool = True) -> tuple[list[int], list[int]]:
        """Return the ids of a question and of its answer, without opening images.

        Args:
            question: the question.
            with_answer: whether to encode the answer too.

        Returns:
            Ids from BOS to where the answer begins, and those of the answer with EOS, or an empty list.

        Raises:
            DataError: if the answer is needed and missing, or the sequence is too long.
        """
        prompt = [self.tokenizer.bos_id]
        for index, text in enumerate(question.question.split(_MARKER)):
            if index and self.image_token is not None:
                prompt += [self.image_token] * self.markers_per_image
            prompt += self.tokenizer.encode(text)
        answer: list[int] = []
        if with_answer:
            if question.answer is None:
                raise DataError(f"The question {question.question!r} has no answer.")
            answer = [*self.tokenizer.encode(question.answer), self.tokenizer.eos_id]
        num_tokens = len(prompt) + len(answer)
        if self.max_seq_len is not None and num_tokens > self.max_seq_len:
            raise DataError(
                f"The question {question.question!r} is {num_tokens} tokens long with its answer, and "
                f"max_seq_len is {self.max_seq_len}."
            )
        return prompt, answer

    def encoder_mask(self, tokens: Sequence[int], num_images: int) -> Tensor:
        """Return which features each token may attend to, bool ``[s, num_images * features_per_image]``.

        Args:
            tokens: a whole sequence.
            num_images: the number of its images.
        """
        if self.image_token is None:
            shape = (len(tokens), num_images * self.features_per_image)
            return torch.ones(shape, dtype=torch.bool)
        return image_mask(
            torch.tensor([list(tokens)]),
            self.image_token,
            features_per_image=self.features_per_image,
            num_images=num_images,
            markers_per_image=self.markers_per_image,
            scope=self.scope,
        )[0]


def check_questions(
    transform: QuestionTransform, questions: Sequence[Question], path: str | Path
) -> int:
    """Check that every question has an answer and is not too long with it.

    Args:
        transform: turns questions into sequences.
        questions: the questions.
        path: their file, for the message.

    Returns:
        Tokens of the longest answer, EOS included.

    Raises:
        DataError: for the first question that has no answer or is too long, naming file and question.
    """
    longest = 0
    for question in questions:
        try:
            longest = max(longest, len(transform.encode(question)[1]))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
    return longest


class QuestionDataset(Dataset[dict[str, Any]]):
    """The questions of a file, encoded for training.

    Args:
        transform: turns a question into a sample; a torchtune recipe passes its tokenizer here.
        path: the question file.
        limit: how many of the file's questions to use, from its start; None: all.

    Raises:
        DataError: naming each line that is wrong, or the first question without answer or too long.
    """

    def __init__(self, transform: QuestionTransform, path: str | Path, limit: int | None = None) -> None:
        self.transform = transform
        self.questions = read_questions(path)[:limit]
        check_questions(transform, self.questions, path)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.transform(self.questions[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
