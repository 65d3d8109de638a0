"""Batches of optimizer steps, and the tokens in them."""

import json

import pytest
import torch
from prompt_settings import LAYOUTS, PER_IMAGE, images, transform

from torchfuse.data.collate import padded_collate_images
from torchfuse.data.questions import QuestionDataset, QuestionTransform
from torchfuse.data.steps import count_tokens, optimizer_steps

NUM = 13


@pytest.fixture
def questions(tmp_path):
    """Thirteen questions, distinct in their second word, with none, one or two images."""
    images(tmp_path)
    records = [
        {
            "question": f"{'<image> ' * (n % 3)}w4 w{5 + n}" + " w6" * (n % 4),
            "images": ["a.png", "b.png"][: n % 3],
            "answer": "w7 w8" if n % 2 else "w9",
        }
        for n in range(NUM)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def load(layout):
        return QuestionDataset(transform(tmp_path, layout, QuestionTransform), tmp_path / "q.jsonl")

    return load


def questions_of(step):
    """Which questions are in a step, by the word behind ``w4``."""
    return [int(row[(row == 4).nonzero()[0] + 1]) - 5 for batch in step for row in batch["tokens"]]


@pytest.mark.parametrize(("max_steps", "expected"), [(None, 6), (5, 5), (100, 6)])
def test_number_of_steps(questions, max_steps, expected):
    options = {"batch_size": 3, "batches_per_step": 2, "epochs": 3, "max_steps": max_steps}
    num_steps, steps = optimizer_steps(questions("last"), **options)
    steps = list(steps)
    assert num_steps == len(steps) == expected
    assert all(len(step) == 2 and len(questions_of(step)) == 6 for step in steps)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 6])
def test_skipped_steps_read_no_question(questions, start, monkeypatch):
    options = {"batch_size": 3, "batches_per_step": 2, "epochs": 3, "seed": 3}
    whole = [questions_of(step) for step in optimizer_steps(questions("last"), **options)[1]]
    read, get = [], QuestionDataset.__getitem__
    monkeypatch.setattr(
        QuestionDataset, "__getitem__", lambda self, index: read.append(index) or get(self, index)
    )
    num_steps, steps = optimizer_steps(questions("last"), start=start, **options)
    assert num_steps == 6
    assert [questions_of(step) for step in steps] == whole[start:]
    assert len(read) == 6 * (6 - start)
    limited = optimizer_steps(questions("last"), start=start, max_steps=5, **options)[1]
    assert [questions_of(step) for step in limited] == whole[start:5]


def test_an_epoch_repeats_no_question_and_the_next_has_another_order(questions):
    _, steps = optimizer_steps(questions("all"), batch_size=2, epochs=2, seed=3)
    orders = [questions_of(step) for step in steps]
    first, second = ([n for step in half for n in step] for half in (orders[:6], orders[6:]))
    assert len(set(first)) == len(set(second)) == len(first) == 12
    assert first != second
    _, again = optimizer_steps(questions("all"), batch_size=2, epochs=2, seed=3)
    assert [questions_of(step) for step in again] == orders
    _, other = optimizer_steps(questions("all"), batch_size=2, epochs=2, seed=4)
    assert [questions_of(step) for step in other] != orders


def test_ranks_together_have_the_questions_of_one_process(questions):
    def order(rank, world_size, batch_size):
        options = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        num_steps, steps = optimizer_steps(questions("all"), **options)
        steps = [questions_of(step) for step in steps]
        assert len(steps) == num_steps == 3
        return steps

    alone = order(0, 1, 4)
    shared = zip(order(0, 2, 2), order(1, 2, 2), strict=True)
    assert [sorted(one + other) for one, other in shared] == [sorted(step) for step in alone]


def test_too_few_for_one_step(questions):
    for options in ({"batch_size": 14}, {"batch_size": 5, "batches_per_step": 3}):
        with pytest.raises(
            ValueError, match=r"^13 questions are too few for one step of 1 x \d+ x [13]\.$"
        ):
            optimizer_steps(questions("all"), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_counted_alike_in_every_layout(questions, layout):
    data = questions(layout)
    batch = padded_collate_images(list(data), data.transform.pad_id)
    words = [
        1 + len(q.question.replace("<image>", "").split()) + len(q.answer.split()) + 1
        for q in data.questions
    ]
    shown = sum(len(q.images) for q in data.questions)
    assert count_tokens(batch, data.transform) == {"text": sum(words), "image": PER_IMAGE * shown}


def test_a_batch_of_text_has_no_tokens_of_images(questions):
    data = questions("prefix")
    batch = padded_collate_images([data[0], data[3]], data.transform.pad_id)
    assert "encoder_mask" not in batch
    counts = count_tokens(batch, data.transform)
    assert counts == {"text": int(torch.count_nonzero(batch["tokens"])), "image": 0}
