import hf
import pytest
import torch
from prompt_settings import LAYOUTS, images, model_for, sample, tokenizer, transform
from support import VOCAB

from torchfuse import from_pretrained
from torchfuse.data import (
    ImageTransform,
    Message,
    Sample,
    SampleTransform,
    TiledImageTransform,
    padded_collate_images,
)
from torchfuse.tasks.evaluation import AnswerLoss, answer_losses
from torchfuse.tasks.image_inputs import fit_to_encoder


def mixed(folder):
    a, b, c = images(folder).values()
    turns = [
        Message("user", ["w4 w5"]),
        Message("assistant", ["w6"], weight=0.5),
        Message("user", ["w7"]),
        Message("assistant", ["w8 w9 w10"]),
    ]
    return [
        sample("<image> w4", (a,), "w5"),
        sample("w5 w6 w7 w8 w9", answer="w4 w6"),
        Sample(turns),
        sample("w4 <image> w5 w6 <image> <image> w7", (b, a, c), "w11 w12"),
        sample("w9", answer="w9"),
        sample("w7 <image>", (c,), "w13 w14 w15 w16 w17"),
    ]


@torch.no_grad()
def one_by_one(model, made, samples):
    """The losses of samples, each in a batch of its own, through torch's cross-entropy."""
    losses = []
    for each in samples:
        batch = padded_collate_images([made(each)])
        labels, weights = batch.pop("labels")[0, 1:], batch.pop("loss_weights", None)
        logits = model(**fit_to_encoder(model, batch))[0, :-1].float()
        weights = (labels >= 0).float() if weights is None else weights[0, 1:] * (labels >= 0)
        tokens = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        greedy = ((logits.argmax(-1) == labels) | (labels < 0)).all()
        losses.append((float((tokens * weights).sum()), float(weights.sum()), bool(greedy)))
    return losses


def compare(got, expected):
    assert [each.total for each in got] == pytest.approx([total for total, _, _ in expected], rel=1e-5)
    assert [each.count for each in got] == [count for _, count, _ in expected]
    assert [each.is_greedy for each in got] == [greedy for _, _, greedy in expected]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_have_the_losses_of_single_samples(tmp_path, layout):
    model, made, samples = model_for(layout), transform(tmp_path, layout), mixed(tmp_path)
    expected = one_by_one(model, made, samples)
    model.train()
    for batch_size in (1, 4, 50):
        compare(answer_losses(model, made, samples, batch_size=batch_size), expected)
    assert model.training
    assert len({total for total, _, _ in expected}) == len(samples)
    assert answer_losses(model, made, [], batch_size=3) == []


class Successor(torch.nn.Module):
    """The likeliest token is the next one, and after the last word the end."""

    def __init__(self, last, end):
        super().__init__()
        table = torch.eye(VOCAB).roll(1, dims=1)
        table[last] = torch.eye(VOCAB)[end]
        self.logits = torch.nn.Embedding.from_pretrained(table)

    def forward(self, tokens, **_):
        return self.logits(tokens)


def test_an_answer_is_greedy_if_every_token_is_the_likeliest(tmp_path):
    made = transform(tmp_path, "last")
    answers = {"w6 w7": True, "w6": False, "w7": False, "w6 w7 w8": False}
    samples = [sample("w4 w5", answer=answer) for answer in answers]
    losses = answer_losses(Successor(last=7, end=2), made, samples, batch_size=3)
    assert [loss.is_greedy for loss in losses] == list(answers.values())


def test_tiles_of_llama_vision(tmp_path):
    hf.mllama(tmp_path / "mllama")
    model = from_pretrained(tmp_path / "mllama").eval()
    words = tokenizer(tmp_path / "words")
    for tiles in (ImageTransform(12), TiledImageTransform(12, max_tiles=4)):
        made = SampleTransform.for_model(model, words, tiles, "plain")
        samples = mixed(tmp_path)
        expected = one_by_one(model, made, samples)
        compare(answer_losses(model, made, samples, batch_size=4), expected)


def test_the_mean_is_a_token():
    assert AnswerLoss(3.0, 1.5, False).mean == 2
