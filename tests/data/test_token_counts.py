"""The tokens of batches by modality."""

import json

import pytest
import torch
from prompt_settings import LAYOUTS, PER_IMAGE, images, transform

from torchfuse.data import padded_collate_images, read_samples
from torchfuse.data.loading import count_tokens

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
        return transform(tmp_path, layout), read_samples(tmp_path / "q.jsonl")

    return load


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_counted_alike_in_every_layout(questions, layout):
    encode, samples = questions(layout)
    batch = padded_collate_images([encode(sample) for sample in samples], encode.pad_id)
    words = [
        1 + len(sample.prompt[0].text.split()) + len(sample.answer.split()) + 1 for sample in samples
    ]
    shown = sum(len(sample.images) for sample in samples)
    assert count_tokens(batch, encode) == {"text": sum(words), "image": PER_IMAGE * shown}


def test_a_batch_of_text_has_no_tokens_of_images(questions):
    encode, samples = questions("prefix")
    batch = padded_collate_images([encode(samples[0]), encode(samples[3])], encode.pad_id)
    assert "encoder_mask" not in batch
    counts = count_tokens(batch, encode)
    assert counts == {"text": int(torch.count_nonzero(batch["tokens"])), "image": 0}
