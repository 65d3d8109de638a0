from pathlib import Path

import pytest

from torchfuse.data.questions import Question
from torchfuse.tasks.evaluation import Prediction, accuracy, swap_images


def question(number, images=1, kind="k"):
    paths = tuple(Path(f"{number}-{i}.png") for i in range(images))
    return Question(f"question {number}", paths, answer=f"answer {number}", kind=kind)


def test_accuracy_by_kind():
    predictions = [
        Prediction(question(1), "answer 1"),
        Prediction(question(2), "answer  2 "),
        Prediction(question(3), "answer 1"),
        Prediction(question(4, kind="other"), ""),
        Prediction(Question("other", answer="yes"), ""),
    ]
    assert accuracy(predictions) == {"k": 2 / 3, "other": 0.0, "question": 0.0, "all": 0.4}


def test_every_question_gets_the_images_of_another():
    questions = [question(n) for n in range(7)] + [question(n, images=2) for n in range(7, 10)]
    swapped = swap_images(questions, seed=3)
    for before, after in zip(questions, swapped, strict=True):
        assert (before.question, before.answer, before.kind) == (
            after.question,
            after.answer,
            after.kind,
        )
        assert before.images != after.images
        assert len(before.images) == len(after.images)
    assert {q.images for q in questions} == {q.images for q in swapped}


def test_questions_without_another_are_dropped():
    questions = [question(1), question(2), question(3, images=2), question(4, images=0)]
    swapped = swap_images(questions)
    assert [q.answer for q in swapped] == ["answer 1", "answer 2"]
    with pytest.raises(ValueError, match="No two questions have the same number of images"):
        swap_images([question(1, images=0), question(2, images=0), question(3)])


def test_accuracy_needs_answers_to_compare_with():
    with pytest.raises(ValueError, match="1 of 2 questions have no answer"):
        accuracy([Prediction(question(1), "answer 1"), Prediction(Question("unknown"), "")])
