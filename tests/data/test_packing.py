"""Packs of samples, and batches of packs."""

import pytest
import torch

from torchfuse.data import MediaInput, cut_between_turns, pack, padded_collate_images
from torchfuse.data.packing import FirstFit
from torchfuse.errors import ConfigError, DataError
from torchfuse.training import next_token_loss

FEATURES = 3
FIELDS = ("tokens", "labels", "document_ids", "input_pos")


def sample(length, images=0, *, first=10, features=FEATURES):
    """A question about images, the first half of its tokens, and an answer."""
    half = length // 2
    mask = torch.zeros(length, images * features, dtype=torch.bool)
    mask[half:] = True
    ids = list(range(first, first + length))
    return {
        "tokens": ids,
        "labels": [-100] * half + ids[half:],
        "images": torch.full((images, 3, 2, 2), float(first)),
        "encoder_mask": mask,
    }


def turns(*lengths, images=()):
    """A conversation of turns, user and assistant in alternation, with an image in front of some."""
    tokens, labels, starts = [], [], []
    for turn, length in enumerate(lengths):
        starts.append(len(tokens))
        ids = list(range(100 * turn + 1, 100 * turn + 1 + length))
        tokens += ids
        labels += ids if turn % 2 else [-100] * length
    mask = torch.zeros(len(tokens), len(images) * FEATURES, dtype=torch.bool)
    for index, turn in enumerate(images):
        mask[starts[turn] :, index * FEATURES : (index + 1) * FEATURES] = True
    pixels = torch.arange(len(images), dtype=torch.float).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return {"tokens": tokens, "labels": labels, "images": pixels, "encoder_mask": mask}


def stream(num, seed=0):
    """Samples of many lengths with no, one or two images."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 24, (num,), generator=generator).tolist()
    return [sample(n, i % 3, first=100 * (i + 1)) for i, n in enumerate(lengths)]


def documents(packed):
    """The documents of a pack: tokens, labels, positions, pixels, and the mask over all features."""
    found = []
    for index in range(int(packed["document_ids"].max()) + 1):
        own = packed["document_ids"] == index
        found.append(
            {key: packed[key][own] for key in ("tokens", "labels", "input_pos", "encoder_mask")}
        )
    return found


def same(one, other):
    return all(
        torch.equal(one[key], other[key]) if key != "images" else pixels(one) == pixels(other)
        for key in {**one, **other}
    )


def pixels(packed):
    return [float(media.items.mean()) for media in packed["images"]]


def test_every_sample_is_in_one_pack_as_it_was():
    samples = stream(200)
    packs = list(pack(samples, 41))
    assert {len(packed[key]) for packed in packs for key in FIELDS} == {41}
    found = {}
    for packed in packs:
        at = 0
        for document in documents(packed):
            one = samples[int(document["tokens"][0]) // 100 - 1]
            n = one["encoder_mask"].shape[1]
            assert document["tokens"].tolist() == one["tokens"]
            assert document["labels"].tolist() == [-100, *one["labels"][1:]]
            assert document["input_pos"].tolist() == list(range(len(one["tokens"])))
            assert torch.equal(document["encoder_mask"][:, at : at + n], one["encoder_mask"])
            assert not document["encoder_mask"][:, :at].any()
            assert not document["encoder_mask"][:, at + n :].any()
            assert (
                pixels(packed)[at // FEATURES :][: n // FEATURES]
                == one["images"].mean((1, 2, 3)).tolist()
            )
            at += n
            found[one["tokens"][0]] = one
        padding = packed["document_ids"] == -1
        assert not packed["tokens"][padding].any()
        assert (packed["labels"][padding] == -100).all()
        assert not packed["encoder_mask"][padding].any()
        assert packed["encoder_mask"].shape == (41, len(packed["images"]) * FEATURES)
    assert len(found) == len(samples)


def test_packs_are_nearly_full():
    samples = stream(500)
    used = sum(len(one["tokens"]) for one in samples)
    packs = list(pack(samples, 64))
    assert used / (64 * len(packs)) > 0.96
    assert len(packs) <= len(list(pack(samples, 64, max_open=1)))


def test_packs_are_made_as_samples_come_and_continue_from_a_state():
    samples, taken = stream(150), []
    packs = pack((taken.append(one) or one for one in samples), 41, max_open=3)
    first = [next(packs) for _ in range(5)]
    assert packs.num_samples == len(taken) < 60
    state = packs.state_dict()
    rest = list(packs)
    other = pack(samples[state["num_samples"] :], 41, max_open=3)
    other.load_state_dict(state)
    assert all(same(one, two) for one, two in zip(other, rest, strict=True))
    assert other.state_dict()["num_samples"] == 150
    again = list(pack(samples, 41, max_open=3))
    assert all(same(one, two) for one, two in zip(again, first + rest, strict=True))


def test_first_fit_holds_as_many_bins_as_it_may():
    bins = FirstFit(11, max_open=2)
    assert bins.add("a", 11) == ["a"]  # never opened
    assert [bins.add("b", 5), bins.add("c", 8), bins.add("d", 6)] == [None, None, ["b", "d"]]
    assert [bins.add("e", 9), bins.add("f", 4)] == [None, ["e"]]  # the fullest
    assert [bins.pop(), bins.pop(), bins.pop()] == [["c"], ["f"], None]
    with pytest.raises(ConfigError, match="room for a token, and one that is open: got 0 and 2"):
        FirstFit(0, max_open=2)


def test_samples_that_are_too_long_are_dropped_and_counted():
    packs = pack([sample(9), sample(12, 1), sample(5)], 11)
    assert [len(documents(packed)) for packed in packs] == [1, 1]
    assert (packs.num_samples, packs.num_dropped, packs.num_cut) == (3, 1, 0)
    with pytest.raises(DataError, match="Sample 1: 12 tokens, and max_seq_len is 11"):
        list(pack([sample(9), sample(12)], 11, too_long="error"))


@pytest.mark.parametrize(("room", "length", "images"), [(30, 27, 3), (26, 18, 2), (17, 7, 1), (8, 7, 1)])
def test_a_conversation_is_cut_after_an_answer(room, length, images):
    """Turns end at 4, 7, 12, 18, 22, 27; images precede turns 0, 2 and 4."""
    whole = turns(4, 3, 5, 6, 4, 5, images=(0, 2, 4))
    cut = cut_between_turns(
        whole
        | {
            "tokens": [*whole["tokens"], 7],
            "labels": [*whole["labels"], -100],
            "encoder_mask": torch.cat([whole["encoder_mask"], whole["encoder_mask"][-1:]]),
        },
        room,
    )
    assert cut["tokens"] == whole["tokens"][:length]
    assert cut["labels"] == whole["labels"][:length]
    assert pixels(cut) == list(range(images))
    assert torch.equal(cut["encoder_mask"], whole["encoder_mask"][:length, : images * FEATURES])


def test_nothing_is_left_of_a_conversation_without_an_answer_that_fits():
    assert cut_between_turns(turns(4, 9, 3, 2), 12) is None
    packs = pack([turns(4, 9, 3, 2), turns(4, 3, 9, 2, images=(2,))], 12, too_long="cut")
    (packed,) = packs
    assert packed["tokens"].tolist()[:8] == [1, 2, 3, 4, 101, 102, 103, 0]
    assert (packed["images"], packed["encoder_mask"].shape) == ([], (12, 0))
    assert (packs.num_samples, packs.num_dropped, packs.num_cut) == (2, 1, 1)
    silent = turns(4, 3, 9, 2) | {"loss_weights": [0.0] * 18}
    assert cut_between_turns(silent, 12) is None


def test_features_in_front_of_the_text_take_positions_of_a_pack():
    samples = [sample(7, 1), sample(6, 2), sample(8)]  # 10, 12 and 8 positions
    packs = list(pack(samples, 19, layout="prefix"))
    assert [len(packed["tokens"]) for packed in packs] == [19 - 3, 19 - 6]
    assert [len(documents(packed)) for packed in packs] == [2, 1]
    (cut,) = pack([turns(4, 3, 2, 2, images=(0,))], 12, layout="prefix", too_long="cut")
    assert cut["tokens"].tolist() == [1, 2, 3, 4, 101, 102, 103, 0, 0]


def test_placeholders_need_no_mask_by_token():
    (packed,) = pack([sample(7, 1), sample(6, 2)], 19, layout="placeholder")
    assert packed["encoder_mask"].tolist() == [True] * 9
    batch = padded_collate_images(
        [packed, {**packed, "images": packed["images"][:1], "encoder_mask": packed["encoder_mask"][:3]}]
    )
    assert batch["encoder_mask"].int().tolist() == [[1] * 9, [1] * 3 + [0] * 6]


def test_a_batch_of_packs():
    packs = list(pack(stream(12), 41))
    batch = padded_collate_images(packs[:2])
    for row, packed in enumerate(packs[:2]):
        for key in FIELDS:
            assert torch.equal(batch[key][row], packed[key])
        n = packed["encoder_mask"].shape[1]
        assert torch.equal(batch["encoder_mask"][row, :, :n], packed["encoder_mask"])
        assert batch["encoder_mask"][row].sum() == packed["encoder_mask"].sum()
        images = batch["encoder_input"]["images"][row]
        assert images.mean((1, 2, 3)).tolist()[: len(packed["images"])] == pixels(packed)


def test_tiled_images_of_several_encoders():
    """Media with other numbers of items, in a row of their own or as one sequence."""

    def two(tiles, seconds, first):
        eye = [MediaInput(torch.full((t, 3, 2, 2), float(t)), max_items=4) for t in tiles]
        ear = [MediaInput(torch.full((t, 5), float(t)), keyword="x") for t in seconds]
        masks = {
            "eye": torch.ones(6, 2 * sum(tiles)).bool(),
            "ear": torch.ones(6, 3 * sum(seconds)).bool(),
        }
        return sample(6, first=first) | {"images": {"eye": eye, "ear": ear}, "encoder_mask": masks}

    samples = [two((4, 1), (2,), 10), two((2,), (), 20), sample(6, first=30)]
    batch = padded_collate_images(list(pack(samples, 13)))
    assert batch["encoder_input"]["eye"]["images"].shape == (2, 3, 4, 3, 2, 2)
    assert batch["encoder_input"]["ear"]["x"].shape == (2, 2, 5)
    eye = batch["encoder_mask"]["eye"].unflatten(-1, (3, 4, 2))[0]
    assert eye[:6].sum((0, 2, 3)).tolist() == [6 * 8, 6 * 2, 0]
    assert eye[6:12].sum((0, 2, 3)).tolist() == [0, 0, 6 * 4]
    assert not batch["encoder_mask"]["ear"][0, 6:].any()
    assert batch["encoder_mask"]["ear"][0, :6].all()
    assert not batch["encoder_mask"]["ear"][1].any()
    (packed,) = pack(samples, 18)  # with text in the same pack
    assert {name: len(media) for name, media in packed["images"].items()} == {"eye": 3, "ear": 1}


def test_the_first_token_of_a_document_is_not_learned_and_weights_stay_with_their_tokens():
    samples = [sample(5), sample(4, first=20) | {"loss_weights": [0.5] * 4}]
    for one in samples:
        one["labels"] = one["tokens"]
    (packed,) = pack(samples, 11)
    assert packed["labels"].tolist() == [-100, 11, 12, 13, 14, -100, 21, 22, 23, -100, -100]
    assert packed["loss_weights"].tolist() == [1.0] * 5 + [0.5] * 4 + [0.0] * 2
    logits = torch.randn(2, 11, 37, generator=torch.Generator().manual_seed(0))
    batch = padded_collate_images([packed, packed])
    _, count = next_token_loss(logits, batch["labels"])
    assert count == 2 * (4 + 3)


def test_options_and_samples_that_do_not_fit():
    with pytest.raises(
        ConfigError, match="layout must be one of marker, placeholder, prefix, got 'row'"
    ):
        pack([], 11, layout="row")
    with pytest.raises(ConfigError, match="too_long must be one of drop, cut, error, got 'trim'"):
        pack([], 11, too_long="trim")
    wrong = sample(4, 2) | {"encoder_mask": torch.ones(4, 5).bool()}
    with pytest.raises(
        DataError, match=r"Sample 0: A sample has 4 tokens and 2 images, but an encoder_mask of \[4, 5\]"
    ):
        list(pack([wrong], 11))
    packed = next(pack([sample(4)], 11))
    with pytest.raises(DataError, match="batch have document_ids or none has; sample 1 has none"):
        padded_collate_images([packed, sample(4)])
