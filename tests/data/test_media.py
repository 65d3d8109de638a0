"""Media of rows, as the input of an encoder."""

import pytest
import torch

from torchfuse.data.media import MediaInput, as_media_input, collate_media
from torchfuse.encoders import MllamaVisionEncoder
from torchfuse.errors import DataError


def tiles(count, **fields):
    return MediaInput(torch.randn(count, 3, 5, 7), **fields)


def test_items_of_a_row_are_one_sequence():
    image, clip = as_media_input(torch.randn(3, 5, 7)), tiles(3)
    inputs, real = collate_media([[image, clip], [], [clip]])
    expected = torch.zeros(3, 4, 3, 5, 7)
    expected[0] = torch.cat([image.items, clip.items])
    expected[2, :3] = clip.items
    assert list(inputs) == ["images"]
    assert torch.equal(inputs["images"], expected)
    assert real.tolist() == [[True] * 4, [False] * 4, [True] * 3 + [False]]


def test_items_are_kept_by_media_where_the_encoder_takes_them_so():
    torch.manual_seed(0)
    encoder = MllamaVisionEncoder(
        image_size=8,
        patch_size=4,
        embed_dim=6,
        num_layers=2,
        num_global_layers=1,
        num_heads=2,
        hidden_dim=11,
        decoder_dim=7,
        intermediate_layers=[0],
        max_num_tiles=3,
        supported_aspect_ratios=[(1, 1), (1, 2), (2, 1), (1, 3)],
    ).eval()
    ratios = [(1, 2), (1, 1), (2, 1)]
    media = [
        MediaInput(
            torch.randn(h * w, 3, 8, 8), extras={"aspect_ratio": torch.tensor([h, w])}, max_items=3
        )
        for h, w in ratios
    ]
    inputs, real = collate_media([media[:2], media[2:], []])
    assert inputs["images"].shape == (3, 2, 2, 3, 8, 8)
    features = encoder(**inputs).unflatten(1, (2, 3, encoder.tokens_per_tile))
    for at, each in zip([(0, 0), (0, 1), (1, 0)], media, strict=True):
        alone = encoder(each.items[None, None], each.extras["aspect_ratio"][None, None])
        alone = alone.unflatten(1, (3, -1))[0, : each.num_items]
        assert real[at].sum() == each.num_items
        torch.testing.assert_close(features[at][real[at]], alone)
    assert not real[0, 1, 1:].any() and not real[1, 1].any() and not real[2].any()


@pytest.mark.parametrize(
    ("media", "message"),
    [
        ([tiles(1), tiles(1, keyword="frames")], "must have the same keywords.*'frames'"),
        ([tiles(1), tiles(1, max_items=2)], "the same .*max_items"),
        ([tiles(1), MediaInput(torch.zeros(1, 3, 7, 5))], r"shape of an item, got .*\(3, 7, 5\)"),
        ([tiles(1, extras={"a": torch.ones(2)}), tiles(1)], "'a'"),
        ([tiles(1, max_items=2), tiles(3, max_items=2)], "up to 3 items, and max_items is 2"),
        ([], "no media to collate"),
    ],
)
def test_media_that_do_not_go_together(media, message):
    with pytest.raises(DataError, match=message):
        collate_media([media, []])
