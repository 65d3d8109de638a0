"""Batches of mixed rows give what transformers' ``generate`` gives with the same weights.

Rows have no image, one and two, prompts differ in length, and both sides pad them on the left. Weights
are random and large, so that answers vary: a model that repeats one token proves nothing.
"""

import pytest
import torch
import torch.nn.functional as F
from hf import LLAMA, MLLAMA_TEXT, drop_attention_without_images, llava, mllama

from torchfuse import from_pretrained, generate
from torchfuse.encoders.mllama_tiles import encoder_mask_of_tiles

NEW = 32
PAD = 0
ROOM = {"max_position_embeddings": 97}
LAST = slice(-NEW, None)

pytestmark = pytest.mark.usefixtures("_without_gradients")


@pytest.fixture
def _without_gradients():
    with torch.no_grad():
        yield


def left_padded(rows):
    longest = max(map(len, rows))
    return torch.stack([F.pad(row, (longest - len(row), 0), value=PAD) for row in rows])


def random_text(vocab, length, seed):
    return torch.randint(1, vocab, (length,), generator=torch.Generator().manual_seed(seed))


def random_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def hf_answer(hf_model, tokens, **given):
    """Greedy tokens ``[b, s + 32]`` and the logits behind them ``[b, 32, v]``."""
    result = hf_model.generate(
        input_ids=tokens,
        attention_mask=(tokens != PAD).long(),
        **given,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences, torch.stack(result.logits, dim=1)


def fused_answer(model, tokens, **given):
    return generate(
        model, tokens, **given, max_new_tokens=NEW, temperature=0, pad_id=PAD, scores="logits"
    )


def same_answers(got, expected, but=()):
    """Tokens to the last, logits within 1e-4; ``but`` columns that only one side bans."""
    assert all(len(row.unique()) > 7 for row in expected[0][:, LAST])
    assert torch.equal(got[0], expected[0])
    kept = [i for i in range(expected[1].shape[-1]) if i not in but]
    torch.testing.assert_close(got[1][..., kept], expected[1][..., kept], rtol=0, atol=1e-4)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_that_rows_do_not_depend_on_the_batch(model, tokens, rows):
    """Sampled, a generator for each row. ``rows`` gives what belongs to a row, or to all of them."""
    options = {"max_new_tokens": NEW, "temperature": 1.2, "top_k": 19, "top_p": 0.97, "pad_id": PAD}
    together = generate(model, tokens, **rows(None), **options, generator=seeded(11, 12, 13))
    for row, prompt in enumerate(tokens):
        unpadded = prompt[prompt != PAD][None]
        alone = generate(model, unpadded, **rows(row), **options, generator=seeded(11 + row))
        assert torch.equal(alone[0, LAST], together[row, LAST]), row
        assert len(alone[0, LAST].unique()) > 7
    other = generate(model, tokens, **rows(None), **options, generator=seeded(21, 22, 23))
    assert not any(torch.equal(a, b) for a, b in zip(other, together, strict=True))


# -- Llama 3.2 Vision ---------------------------------------------------------------------------------

MARKER = MLLAMA_TEXT["vocab_size"]  # the image token is behind the ids that the head scores
RATIOS = {0: (0, 0), 2: (1, 2), 5: (2, 1), 6: (2, 2)}  # by transformers' id; 0 pads a row
TOKENS_PER_TILE = 10


class MllamaRows:
    """No image; one of four tiles behind some text; two, of two tiles each."""

    lengths = (11, 19, 13)
    markers = ([], [3], [0, 6])
    ids = torch.tensor([[0, 0], [6, 0], [5, 2]])

    def __init__(self):
        rows = [random_text(MARKER, length, seed) for seed, length in enumerate(self.lengths, 1)]
        for row, markers in zip(rows, self.markers, strict=True):
            row[markers] = MARKER
        self.tokens = left_padded(rows)
        self.images = random_images(3, 2, 4, 3, 12, 12)
        self.ratios = torch.tensor([[RATIOS[int(i)] for i in row] for row in self.ids])
        self.tiles = torch.arange(4) < self.ratios.prod(dim=-1, keepdim=True)  # [3, 2, 4]
        shown = torch.zeros(*self.tokens.shape, 2, dtype=torch.bool)
        for row, markers in enumerate(self.markers):
            for image, marker in enumerate(markers):
                shown[row, self.tokens.shape[1] - self.lengths[row] + marker :, image] = True
        self.shown = shown[..., None] & self.tiles[:, None]  # [3, s, 2, 4]

    def hf_inputs(self):
        return {
            "pixel_values": self.images,
            "aspect_ratio_ids": self.ids,
            "aspect_ratio_mask": self.tiles.long(),
            "cross_attention_mask": self.shown.long(),
        }

    def inputs(self, row=None):
        """For all rows, or for one of them alone, without its padding."""
        if row == 0:
            return {}
        at = slice(None) if row is None else slice(row, row + 1)
        images = slice(None) if row is None else slice(len(self.markers[row]))
        text = slice(None) if row is None else slice(-self.lengths[row], None)
        shown = self.shown[at, text, images]
        return {
            "encoder_input": {
                "images": self.images[at, images],
                "aspect_ratio": self.ratios[at, images],
            },
            "encoder_mask": encoder_mask_of_tiles(shown, TOKENS_PER_TILE),
        }


@pytest.mark.format(
    "Llama 3.2 Vision (Mllama)", "in", "32 tokens of greedy generation equal those of transformers"
)
def test_mllama(tmp_path, monkeypatch):
    hf_model = mllama(tmp_path, text=ROOM)
    model, rows = from_pretrained(tmp_path).eval(), MllamaRows()
    got = fused_answer(model, rows.tokens, **rows.inputs())
    # Of transformers alone, a row without image is right in a call with text only. In the batch it
    # attends to what pads its images, as text before the first image does to that image.
    alone = hf_answer(hf_model, rows.tokens[:1, -rows.lengths[0] :])
    leaking = hf_answer(hf_model, rows.tokens, **rows.hf_inputs())
    assert not torch.equal(leaking[0][0, LAST], alone[0][0, LAST])
    assert torch.equal(got[0][0, LAST], alone[0][0, LAST])
    drop_attention_without_images(monkeypatch, rows.shown.flatten(2).any(dim=-1))
    expected = hf_answer(hf_model, rows.tokens, **rows.hf_inputs())
    assert torch.equal(expected[0][0, LAST], alone[0][0, LAST])
    same_answers(got, expected)
    unseen = fused_answer(model, rows.tokens)[0]
    assert [torch.equal(a, b) for a, b in zip(unseen, got[0], strict=True)] == [True, False, False]


def test_mllama_samples_rows_as_if_alone(tmp_path):
    mllama(tmp_path, text=ROOM)
    model, rows = from_pretrained(tmp_path).eval(), MllamaRows()
    check_that_rows_do_not_depend_on_the_batch(model, rows.tokens, rows.inputs)


# -- LLaVA --------------------------------------------------------------------------------------------

IMAGE = LLAMA["vocab_size"] - 1
PATCHES = 9


class LlavaRows:
    """No image; one behind some text; two, with text between them."""

    lengths = (11, 17, 29)
    starts = ([], [5], [0, 16])  # of the images

    def __init__(self):
        rows = [random_text(IMAGE, length, seed) for seed, length in enumerate(self.lengths)]
        for row, starts in zip(rows, self.starts, strict=True):
            for start in starts:
                row[start : start + PATCHES] = IMAGE
        self.tokens = left_padded(rows)
        self.images = random_images(3, 2, 3, 12, 12)
        self.has = torch.arange(2) < torch.tensor([[len(starts)] for starts in self.starts])  # [3, 2]

    def hf_inputs(self):
        return {"pixel_values": self.images[self.has], "suppress_tokens": [IMAGE]}

    def inputs(self, row=None):
        """For all rows, or for one of them alone."""
        if row == 0:
            return {}
        if row is not None:
            return {"encoder_input": {"images": self.images[row : row + 1, : len(self.starts[row])]}}
        mask = self.has.repeat_interleave(PATCHES, dim=1)
        return {"encoder_input": {"images": self.images}, "encoder_mask": mask}


@pytest.mark.format("LLaVA", "in", "32 tokens of greedy generation equal those of transformers")
def test_llava(tmp_path):
    hf_model = llava(tmp_path, text=ROOM)
    model, rows = from_pretrained(tmp_path).eval(), LlavaRows()
    expected = hf_answer(hf_model, rows.tokens, **rows.hf_inputs())
    same_answers(fused_answer(model, rows.tokens, **rows.inputs()), expected, but=[IMAGE])
    alone = hf_answer(hf_model, rows.tokens[:1, -rows.lengths[0] :], suppress_tokens=[IMAGE])
    assert torch.equal(expected[0][0, LAST], alone[0][0, LAST])


def test_llava_with_adjacent_images(tmp_path):
    """As transformers takes them; a fourth row, so that rows and images differ in number."""
    hf_model = llava(tmp_path, text=ROOM)
    model, rows = from_pretrained(tmp_path).eval(), LlavaRows()
    tokens = torch.cat([rows.tokens, rows.tokens[2:].flip(1)])
    images = torch.cat([rows.images[rows.has], -rows.images[2]])
    expected = hf_answer(hf_model, tokens, pixel_values=images, suppress_tokens=[IMAGE])
    got = fused_answer(model, tokens, encoder_input={"images": images})
    same_answers(got, expected, but=[IMAGE])


def test_llava_samples_rows_as_if_alone(tmp_path):
    llava(tmp_path, text=ROOM)
    model, rows = from_pretrained(tmp_path).eval(), LlavaRows()
    check_that_rows_do_not_depend_on_the_batch(model, rows.tokens, rows.inputs)
