import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from torchfuse.data.images import ImageTransform, open_image

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def picture(width=23, height=17):
    values = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", [(23, 17), (17, 24), (11, 11), (8, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 11}, "crop_size": {"height": 11, "width": 11}},
        {"size": {"shortest_edge": 14}, "crop_size": {"height": 11, "width": 11}, "resample": 2},
        {"size": {"height": 11, "width": 11}, "do_center_crop": False},
    ],
    ids=str,
)
def test_equals_transformers_processor(tmp_path, size, options):
    theirs = CLIPImageProcessor(image_mean=MEAN, image_std=STD, **options)
    theirs.save_pretrained(tmp_path)
    image = picture(*size)
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    got = ImageTransform.from_directory(tmp_path)(image)
    # Resizing rounds to whole levels of 255, and two of them may differ by two.
    torch.testing.assert_close(got, expected, rtol=0, atol=2.01 / 255 / min(STD))


def test_normalises_as_the_equations_say():
    image = picture(8, 8)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(ImageTransform(8, MEAN, STD)(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    picture().convert(mode).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").mode == "RGB"


def test_what_does_not_open_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"The image .*missing\.png cannot be opened: No such file"):
        open_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png is no image that can be opened"):
        open_image(tmp_path / "text.png")
    picture().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="cannot be opened: Is a directory"):
        open_image(tmp_path)


def test_a_preprocessor_file_that_says_too_little_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        ImageTransform.from_directory(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    for config in ({}, {"size": 8}, {"size": {"width": 3}, "image_mean": MEAN, "image_std": STD}):
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match="does not say image size, image_mean and image_std"):
            ImageTransform.from_directory(tmp_path)
    file.write_text(json.dumps({"size": 8, "image_mean": MEAN, "image_std": STD}))
    assert ImageTransform.from_directory(tmp_path).size == 8


def test_bad_numbers():
    with pytest.raises(ValueError, match="shorter_side must be 0 or at least size=8, got 5"):
        ImageTransform(8, shorter_side=5)
    with pytest.raises(ValueError, match="got 'lanczos'"):
        ImageTransform(8, resample="lanczos")
    with pytest.raises(ValueError, match="positive size and three means"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="positive deviations"):
        ImageTransform(3, MEAN, [0.0, 1.0, 1.0])
