"""Grids of LLaVA-NeXT: the number of tiles and of features of every image size."""

import numpy as np
import pytest
from pictures import picture
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

from torchfuse.data.images import GridImageTransform
from torchfuse.errors import ConfigError

SIDE, PATCH = 21, 7
RESOLUTIONS = [(21, 42), (42, 21), (42, 42), (63, 21), (21, 63)]


def test_number_of_features_after_merging_is_that_of_transformers():
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(
        image_grid_pinpoints=[list(sides) for sides in RESOLUTIONS]
    )
    processor.patch_size, processor.num_additional_image_tokens = PATCH, 0
    transform = GridImageTransform(SIDE, resolutions=RESOLUTIONS)
    for height, width in np.random.default_rng(5).integers(1, 300, (500, 2)).tolist():
        expected = processor._get_number_of_features(height, width, SIDE, SIDE)
        assert transform.num_merged_features((height, width), SIDE // PATCH) == expected


@pytest.mark.parametrize("limit", [None, 21 * 21, 21 * 42])
def test_size_and_number_of_tiles_are_those_of_the_image_within_the_limit(limit):
    transform = GridImageTransform(SIDE, resolutions=RESOLUTIONS, max_pixels=limit)
    given = transform.media_input(picture(97, 53))
    assert given.num_items == transform.num_items((53, 97)) == transform.num_items(given.size)
    height, width = given.size
    assert (height, width) == (53, 97) if limit is None else height * width <= limit


def test_bad_numbers():
    for resolutions in ([], [(21, 43)], [(21, 42, 21)]):
        with pytest.raises(
            ConfigError, match=r"resolutions .* multiples .* got size=21, resolutions=\["
        ):
            GridImageTransform(SIDE, resolutions=resolutions)
    with pytest.raises(ConfigError, match="A grid needs square tiles"):
        GridImageTransform((21, 42), resolutions=RESOLUTIONS)
