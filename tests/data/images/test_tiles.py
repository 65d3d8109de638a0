"""Tiles of Mllama: the canvas, its aspect ratio, and the budget of pixels."""

import pytest
import torch
from pictures import picture
from transformers import MllamaImageProcessorPil

from torchfuse.data.images import ImageTransform, TiledImageTransform
from torchfuse.data.media import collate_media
from torchfuse.errors import ConfigError

SIZES = [(23, 17), (17, 24), (14, 14), (14, 42), (71, 5), (3, 29), (97, 101), (15, 13), (56, 14)]


@pytest.mark.parametrize("max_tiles", [1, 2, 4, 6])
def test_a_batch_equals_transformers(tmp_path, max_tiles):
    processor = MllamaImageProcessorPil(
        size={"height": 14, "width": 14}, max_image_tiles=max_tiles, resample=3
    )
    processor.save_pretrained(tmp_path)
    transform = ImageTransform.from_directory(tmp_path)
    assert isinstance(transform, TiledImageTransform)
    images = [[picture(*size) for size in SIZES[:4]], [picture(*size) for size in SIZES[4:]]]
    expected = processor(images, return_tensors="pt")
    inputs, real = collate_media([[transform.media_input(image) for image in row] for row in images])
    most = inputs["images"].shape[2]
    assert torch.equal(inputs["images"], expected["pixel_values"][:, :, :most])
    ratios = [(h, w) for h in range(1, 7) for w in range(1, 7) if h * w <= max_tiles]  # of ids 1, 2, ...
    for at, index in enumerate(expected["aspect_ratio_ids"].flatten().tolist()):
        given = tuple(inputs["aspect_ratio"].flatten(0, 1)[at].tolist())
        assert given == (ratios[index - 1] if index else (0, 0))
    # transformers marks the first tile of an image that pads a row too
    expected["aspect_ratio_mask"][expected["aspect_ratio_ids"] == 0] = 0
    assert torch.equal(real, expected["aspect_ratio_mask"].bool())


def test_a_limit_of_pixels_gives_fewer_tiles():
    image = picture(97, 101)
    numbers = [
        TiledImageTransform(14, max_tiles=6, max_pixels=limit).media_input(image).num_items
        for limit in (14 * 14, 2 * 14 * 14, None)
    ]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 1


def test_bad_numbers():
    for options in ({"size": (7, 13)}, {"size": 7, "max_tiles": 0}):
        with pytest.raises(ConfigError, match="Tiles must be squares, at least one an image, got size="):
            TiledImageTransform(**options)
