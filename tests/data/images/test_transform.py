"""Whole images become the pixels of transformers' processors, to the bit."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from pictures import picture, write
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from torchfuse.data.images import ImageTransform
from torchfuse.errors import CheckpointError, ConfigError, DataError

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
CROP = {"crop_size": {"height": 11, "width": 11}}
# Options of preprocessor files: steps alone and together, sizes in every form.
OPTIONS = [
    {"size": {"shortest_edge": 11}, **CROP},
    {"size": {"shortest_edge": 14}, **CROP, "resample": 2},
    {"size": {"shortest_edge": 7}, **CROP},
    {"size": {"height": 11, "width": 11}, "do_center_crop": False},
    {"size": {"height": 19, "width": 19}, **CROP},
    {"size": {"height": 13, "width": 29}, **CROP, "resample": 0},
    {"size": 17, "crop_size": 11},
    {"do_resize": False, **CROP},
    {"size": 13, **CROP, "rescale_factor": 1 / 127.5},
    {"size": 13, **CROP, "do_rescale": False},
    {"size": 13, **CROP, "do_normalize": False},
    {"size": 13, **CROP, "do_rescale": False, "do_normalize": False},
    {"size": 13, **CROP, "do_convert_rgb": False},
    {"size": {"height": 13, "width": 7}, "do_center_crop": False},
    {"size": 13, "crop_size": {"height": 7, "width": 19}},
    {"size": 13, **CROP, "resample": 1},
    {"size": 13, **CROP, "resample": 4},
]
MODES = [
    "RGB",
    "L",
    "P",
    "PA",
    "1",
    "RGBA",
    "LA",
    "CMYK",
    "HSV",
    "YCbCr",
    "LAB",
    "I;16",
    "I;16B",
    "I",
    "F",
]


def pixels(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0].float()


def in_mode(mode):
    """A picture in a mode; 16 bits and more hold values beyond 255."""
    if mode.startswith("I"):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
        return Image.fromarray((np.arange(17 * 23) * 151 % 2**16).reshape(17, 23).astype(dtype))
    image = picture().convert("RGBA")
    image.putalpha(picture(seed=5).convert("L"))
    return image.convert("RGB").convert(mode) if mode in ("HSV", "LAB", "PA") else image.convert(mode)


@pytest.mark.parametrize("size", [(23, 17), (17, 24), (11, 11), (8, 9), (31, 5)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_transformers_processor(tmp_path, size, options):
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, **options)
    processor.save_pretrained(tmp_path)
    transform, image = ImageTransform.from_directory(tmp_path), picture(*size)
    assert torch.equal(transform(image), pixels(processor, image))
    assert transform(image).shape == (3, transform.height, transform.width)
    for same in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(same(image), transform(image))


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_converted_as_by_transformers(tmp_path, mode):
    image = in_mode(mode)
    assert image.mode == mode
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, size=13, crop_size=11)
    processor.save_pretrained(tmp_path)
    assert torch.equal(ImageTransform.from_directory(tmp_path)(image), pixels(processor, image))


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "ConvNext"])
@pytest.mark.parametrize("mode", MODES)
def test_processors_without_conversion_take_rgb_only(tmp_path, kind, mode):
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path)
    transform, image = ImageTransform.from_directory(tmp_path), in_mode(mode)
    if mode == "RGB":
        assert torch.equal(transform(image), pixels(processor, image))
        return
    with pytest.raises(DataError, match=f"^The image has mode {mode}, .* without a conversion"):
        transform(image)


def test_transparency_of_a_palette_is_white(tmp_path):
    picture().quantize(7).save(tmp_path / "x.png", transparency=3)
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, size=13, crop_size=11)
    processor.save_pretrained(tmp_path)
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P" and image.info["transparency"] == 3
        assert torch.equal(ImageTransform.from_directory(tmp_path)(image), pixels(processor, image))


@pytest.mark.parametrize("side", [(40, 30), (12, 31), (31, 12), (11, 11)])
def test_images_of_more_pixels_are_made_smaller_first(side):
    transform = ImageTransform(11, max_pixels=31 * 13)
    image = picture(*side)
    height, width = transform._limited((image.height, image.width))
    assert height * width <= 31 * 13
    assert width / height == pytest.approx(side[0] / side[1], rel=0.15)
    smaller = image.resize((width, height), Image.Resampling.BICUBIC)
    assert torch.equal(transform(image), ImageTransform(11)(smaller))
    assert (smaller.size == image.size) == (side[0] * side[1] <= 31 * 13)


@pytest.mark.parametrize("side", [(1, 5000), (5000, 1), (3, 2)])
def test_the_smallest_limit(side):
    assert ImageTransform(11, max_pixels=1)._limited(side) == (1, 1)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_is_near_transformers_torchvision_backend(tmp_path, options):
    processor = CLIPImageProcessor(image_mean=MEAN, image_std=STD, **options)
    processor.save_pretrained(tmp_path)
    # Resizing rounds to whole levels of 255, and two of them may differ by two.
    got, expected = ImageTransform.from_directory(tmp_path)(picture()), pixels(processor, picture())
    torch.testing.assert_close(got, expected, rtol=0, atol=2.01 / 255 / min(STD))


def test_crops_after_resizing_not_instead(tmp_path):
    square = {"height": 16, "width": 16}
    config = {
        "size": {"height": 20, "width": 20},
        "crop_size": square,
        "image_mean": MEAN,
        "image_std": STD,
    }
    transform = ImageTransform.from_directory(write(tmp_path, **config))
    resized = ImageTransform(20, MEAN, STD, resize=[20, 20])(picture())
    assert transform.size == 16
    torch.testing.assert_close(transform(picture()), resized[:, 2:18, 2:18])


@pytest.mark.parametrize("size", [(1, 17_000), (17_000, 1)])
@pytest.mark.parametrize("pad_to_square", [False, True])
def test_an_image_too_narrow_to_be_resized_is_refused(size, pad_to_square):
    transform = ImageTransform(224, pad_to_square=pad_to_square)
    with pytest.raises(DataError, match=r"17,000.* is too narrow: .* it would become .* Crop it first"):
        transform(Image.new("RGB", size))
    assert transform(Image.new("RGB", (3, 700))).shape == (3, 224, 224)


def test_normalises_by_definition():
    image = picture(8, 8)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(ImageTransform(8, MEAN, STD)(image), expected)


def test_bad_numbers():
    for numbers in (
        {"resize": [0]},
        {"resize": [5, 7, 9]},
        {"scale": 0.0},
        {"std": [0.0, 1.0, 1.0]},
        {"mean": [1]},
    ):
        with pytest.raises(
            ConfigError, match=f"all but the means above 0, got size=8, .*{next(iter(numbers))}="
        ):
            ImageTransform(8, **numbers)
    with pytest.raises(ConfigError, match="got size=0"):
        ImageTransform(0)
    with pytest.raises(ConfigError, match="got size=.8, 7, 5., .*max_pixels=None"):
        ImageTransform([8, 7, 5])
    with pytest.raises(ConfigError, match="max_pixels=0"):
        ImageTransform(8, max_pixels=0)
    with pytest.raises(ConfigError, match="resample must be one of .*bicubic.*, got 'cubic'"):
        ImageTransform(8, resample="cubic")


def test_the_encoders_own_transform_fits_it(tmp_path):
    write(tmp_path, size=13, crop_size=11, image_mean=MEAN, image_std=STD, rescale_factor=1 / 127.5)
    ImageTransform.from_directory(tmp_path).check(11, preprocessor=tmp_path)
    ImageTransform(11).check(11)
    unscaled = write(tmp_path, size=13, crop_size=11, do_normalize=False, do_rescale=False)
    ImageTransform.from_directory(unscaled).check(preprocessor=unscaled)


def test_a_comparison_with_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no image processor: expected preprocessor_config"):
        ImageTransform(11).check(11, preprocessor=tmp_path)
    write(tmp_path, size=13)
    with pytest.raises(CheckpointError, match=r"_config\.json holds none of image_mean, image_std and"):
        ImageTransform(11).check(preprocessor=tmp_path)


def test_images_that_are_no_squares():
    transform = ImageTransform((7, 13))
    assert (transform.size, transform.resize) == ((7, 13), [7, 13])
    assert transform(picture()).shape == (3, 7, 13)
    transform.check([7, 13])
    with pytest.raises(ConfigError, match=r"size is \(7, 13\), the encoder's \(13, 7\)"):
        transform.check((13, 7))
    with pytest.raises(ConfigError, match=r"size is \(7, 13\), the encoder's 7"):
        transform.check(7)


def test_each_difference_from_the_encoder_is_named(tmp_path):
    transform = ImageTransform(7, MEAN, STD)
    write(tmp_path, image_mean=[0.1, 0.2, 0.31], image_std=STD, do_rescale=False)
    with pytest.raises(
        ConfigError,
        match=r"encoder 'eye' was trained on: size is 7, the encoder's 11; mean is \[0\.1, 0\.2, 0\.3\], the "
        r"encoder's \[0\.1, 0\.2, 0\.31\]; scale is 0\.0039\d+, the encoder's 1\.0\. ImageTransform",
    ):
        transform.check(11, preprocessor=tmp_path, what="eye")
    with pytest.raises(ConfigError, match=r"the encoder was trained on: size is 7, the encoder's 5\."):
        transform.check(5)
    for wrong in (0.4, [0.4], "half", None, {"a": 1}):
        write(tmp_path, image_std=wrong, image_mean=MEAN)
        if wrong is None:
            transform.check(preprocessor=tmp_path)
        else:
            with pytest.raises(ConfigError, match=r"on: std is \[0\.4, 0\.5, 0\.6\], the encoder's"):
                transform.check(preprocessor=tmp_path)
