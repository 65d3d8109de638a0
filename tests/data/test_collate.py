import pytest
import torch

from torchfuse.data.collate import padded_collate_images
from torchfuse.errors import DataError

FEATURES = 3


def sample(length, images, *, labels=True):
    mask = torch.zeros(length, images * FEATURES, dtype=torch.bool)
    mask[length // 2 :] = True
    made = {
        "tokens": list(range(10, 10 + length)),
        "images": torch.arange(images, dtype=torch.float).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) + 1,
        "encoder_mask": mask,
    }
    return made | ({"labels": [-100, *range(1, length)]} if labels else {})


@pytest.mark.parametrize("left", [False, True])
def test_rows_keep_their_tokens_images_and_masks(left):
    samples = [sample(4, 2), sample(7, 0), sample(5, 1)]
    batch = padded_collate_images(samples, padding_idx=7, ignore_idx=-1, pad_left=left)
    assert batch["tokens"].shape == batch["labels"].shape == (3, 7)
    assert batch["encoder_input"]["images"].shape == (3, 2, 3, 2, 2)
    assert batch["encoder_mask"].shape == (3, 7, 2 * FEATURES)
    for row, one in enumerate(samples):
        length, images = len(one["tokens"]), len(one["images"])
        own = slice(7 - length, None) if left else slice(length)
        rest = slice(7 - length) if left else slice(length, None)
        assert batch["tokens"][row, own].tolist() == one["tokens"]
        assert (batch["tokens"][row, rest] == 7).all()
        assert batch["labels"][row, own].tolist() == one["labels"]
        assert (batch["labels"][row, rest] == -1).all()
        assert torch.equal(batch["encoder_input"]["images"][row, :images], one["images"])
        assert not batch["encoder_input"]["images"][row, images:].any()
        n = images * FEATURES
        assert torch.equal(batch["encoder_mask"][row, own, :n], one["encoder_mask"])
        assert batch["encoder_mask"][row].sum() == one["encoder_mask"].sum()


def test_text_alone_has_no_encoder_input_and_prompts_no_labels():
    batch = padded_collate_images([sample(4, 0, labels=False), sample(2, 0, labels=False)])
    assert list(batch) == ["tokens"]


def test_masks_that_do_not_fit_are_named():
    with pytest.raises(DataError, match="the batch is empty"):
        padded_collate_images([])
    wrong = sample(4, 2) | {"encoder_mask": torch.ones(4, 5, dtype=torch.bool)}
    with pytest.raises(DataError, match=r"Sample 1 of the batch has 4 tokens and 2 images.*\[4, 5\]"):
        padded_collate_images([sample(3, 1), wrong])
    other = sample(4, 1) | {"encoder_mask": torch.ones(4, 5, dtype=torch.bool)}
    with pytest.raises(DataError, match=r"equally many features, got \[3, 5\]"):
        padded_collate_images([sample(3, 1), other])
