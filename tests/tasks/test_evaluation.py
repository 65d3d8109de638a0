import json
from pathlib import Path

import pytest
from prompt_settings import sample

from torchfuse.data import Media, Message, Sample
from torchfuse.tasks import Prediction
from torchfuse.tasks.evaluation import accuracy, prediction_record, swap_images


def question(number, images=1, **metadata):
    made = sample(f"question {number}", [f"{number}-{i}.png" for i in range(images)], f"answer {number}")
    return Sample(made.messages, metadata)


def test_accuracy_by_kind():
    predictions = [
        Prediction(question(1, kind="k"), "answer 1"),
        Prediction(question(2, kind="k"), "answer  2 "),
        Prediction(question(3, kind="k"), "answer 1"),
        Prediction(question(4, kind="other"), ""),
        Prediction(sample("other", answer="yes"), ""),
    ]
    assert accuracy(predictions) == {"k": 2 / 3, "other": 0.0, "question": 0.0, "all": 0.4}


def test_every_sample_gets_the_images_of_another():
    samples = [question(n, kind="k") for n in range(7)]
    samples += [question(n, images=2) for n in range(7, 10)]
    swapped = swap_images(samples, seed=3)
    for before, after in zip(samples, swapped, strict=True):
        texts = [[message.text for message in each.messages] for each in (before, after)]
        assert texts[0] == texts[1]
        assert (before.metadata, before.answer) == (after.metadata, after.answer)
        assert before.images != after.images
        assert len(before.images) == len(after.images)
    assert {tuple(s.images) for s in samples} == {tuple(s.images) for s in swapped}


def test_samples_without_another_are_dropped():
    clip = Message("user", [Media(Path("a.mp4"), modality="video"), "question 5"])
    samples = [question(1), question(2), question(3, images=2), question(4, images=0), Sample([clip])]
    assert [s.answer for s in swap_images(samples)] == ["answer 1", "answer 2"]
    with pytest.raises(ValueError, match="No two samples have the same number of images"):
        swap_images([question(1, images=0), question(2, images=0), question(3), samples[-1]])


def test_accuracy_needs_answers_to_compare_with():
    with pytest.raises(ValueError, match="1 of 2 samples have no answer"):
        accuracy([Prediction(question(1), "answer 1"), Prediction(sample("unknown"), "")])


def test_the_record_of_a_conversation_has_all_its_messages():
    image, other = Media(Path("x/a.png")), Media(data=b"1", name="b.png")
    messages = [
        Message("system", ["Be brief."]),
        Message("user", [image, " which ?"]),
        Message("assistant", ["A cat."]),
        Message("user", ["And ", other, "?"]),
    ]
    expected = Sample([*messages, Message("assistant", ["A dog."])])
    assert json.loads(prediction_record(Prediction(expected, "A fox."), "x/run")) == {
        "kind": "question",
        "question": "And <image>?",
        "images": ["../a.png", "b.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image> which ?"},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And <image>?"},
        ],
        "answer": "A dog.",
        "text": "A fox.",
    }
