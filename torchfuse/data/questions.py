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
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from torchfuse.data.documents import ImageLayout
from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform, open_image
from torchfuse.data.masks import ImageScope
from torchfuse.data.samples import Content, Media, Message, Sample
from torchfuse.data.sequences import IGNORED
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError, DataError, name_problems

__all__ = [
    "Question",
    "QuestionDataset",
    "QuestionTransform",
    "check_questions",
    "read_questions",
]

_MARKER: Final = "<image>"
_FIELDS: Final = {"question": str, "answer": str, "images": list, "kind": str}


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
        problems += [f"line {number}: {problem}" for problem in _image_problems(questions[-1], checked)]
    if problems:
        raise DataError(name_problems(path, problems))
    if not questions:
        raise DataError(f"The question file {path} holds no question.")
    return questions


def _image_problems(question: Question, checked: dict[Path, str]) -> list[str]:
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


def _parse(line: str, folder: Path) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"expected a JSON object, got a {type(record).__name__}.")
    return _question_from(record, folder)


def _question_from(record: Mapping[str, Any], folder: Path) -> Question:
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


class QuestionTransform(SampleTransform):
    """The transform of samples with the template ``"plain"``, which takes questions too.

    Args:
        tokenizer: as for ``SampleTransform``, like all others.
        image_token: id of an image in the sequence.
        features_per_image: features of an image after encoder and adapter.
        image_transform: directory of the encoder, or an ``ImageTransform`` of whole images.
        layout: the tokens of an image in the sequence.
        scope: which images a token may attend to.
        max_seq_len: the longest sequence.
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
        layout: ImageLayout = "marker",
        scope: ImageScope = "last",
        max_seq_len: int | None = None,
        cache_images: int = 0,
    ) -> None:
        super().__init__(
            tokenizer,
            image_token=image_token,
            features_per_image=features_per_image,
            image_transform=image_transform,
            template="plain",
            layout=layout,
            scope=scope,
            max_seq_len=max_seq_len,
            cache_images=cache_images,
        )
        if isinstance(self.image_transform, TiledImageTransform | GridImageTransform):
            raise ConfigError(
                f"image_transform is a {type(self.image_transform).__name__}, but every image of a "
                "question has the same number of features: give an ImageTransform of whole images."
            )

    def pixels(self, path: Path) -> Tensor:
        """Return the pixels of an image file, ``[3, h, w]``."""
        return self.media_input(Media(path)).items[0]

    def __call__(
        self,
        sample: Question | Sample | Mapping[str, Any],
        *,
        with_answer: bool = True,
        inference: bool = False,
    ) -> dict[str, Any]:
        given = _sample(sample) if isinstance(sample, Question) else sample
        return super().__call__(given, with_answer=with_answer, inference=inference)

    def length(self, sample: Question | Sample, *, with_answer: bool = True) -> int:
        given = _sample(sample) if isinstance(sample, Question) else sample
        return super().length(given, with_answer=with_answer)

    def encode(self, question: Question, *, with_answer: bool = True) -> tuple[list[int], list[int]]:
        """Return the ids of a question and of its answer, without opening images.

        Args:
            question: the question.
            with_answer: whether to encode the answer too.

        Returns:
            Ids up to where the answer begins, and those of the answer with EOS, or an empty list.

        Raises:
            DataError: if the answer is needed and missing, or the sequence is too long.
        """
        encoded = self._encode(_sample(question), [1] * len(question.images), with_answer=with_answer)
        tokens, labels = encoded["tokens"], encoded.get("labels", [])
        start = next((i for i, label in enumerate(labels) if label != IGNORED), len(tokens))
        return tokens[:start], tokens[start:]


def _sample(question: Question) -> Sample:
    first, *texts = question.question.split(_MARKER)
    content: Content = [first]
    for path, text in zip(question.images, texts, strict=True):
        content += [Media(path), text]
    messages = [Message("user", content)]
    if question.answer is not None:
        messages.append(Message("assistant", [question.answer]))
    return Sample(messages, {"kind": question.kind}, f"The question {question.question!r}")


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
        packed: torchtune's option, which cannot be used.

    Raises:
        ConfigError: if ``packed`` is true.
        DataError: naming each line that is wrong, or the first question without answer or too long.
    """

    def __init__(
        self,
        transform: QuestionTransform,
        path: str | Path,
        limit: int | None = None,
        packed: bool = False,
    ) -> None:
        if packed:
            raise ConfigError(
                "dataset.packed=True: torchtune's recipes pack text only. Set it to False, or train "
                "with the recipe torchfuse/recipes/finetune.py and data.packed=true, which packs images."
            )
        self.transform = transform
        self.questions = read_questions(path)[:limit]
        check_questions(transform, self.questions, path)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.transform(self.questions[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
