import io
import json
import struct

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessor, CLIPImageProcessorPil

from torchfuse.data.images import ImageTransform, open_image
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
]


def picture(width=23, height=17):
    values = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write(directory, **config):
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    return directory


def pixels(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0].float()


@pytest.mark.parametrize("size", [(23, 17), (17, 24), (11, 11), (8, 9), (31, 5)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_transformers_processor(tmp_path, size, options):
    processor = CLIPImageProcessorPil(image_mean=MEAN, image_std=STD, **options)
    processor.save_pretrained(tmp_path)
    image = picture(*size)
    # The same arithmetic in the same order but for one float32 product: values up to 255 / min(STD).
    torch.testing.assert_close(
        ImageTransform.from_directory(tmp_path)(image), pixels(processor, image), rtol=3e-7, atol=1e-6
    )


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_is_near_transformers_torchvision_backend(tmp_path, options):
    processor = CLIPImageProcessor(image_mean=MEAN, image_std=STD, **options)
    processor.save_pretrained(tmp_path)
    # Resizing rounds to whole levels of 255, and two of them may differ by two.
    got, expected = ImageTransform.from_directory(tmp_path)(picture()), pixels(processor, picture())
    torch.testing.assert_close(got, expected, rtol=0, atol=2.01 / 255 / min(STD))


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "Siglip", "Blip", "DeiT", "ViT"])
@pytest.mark.parametrize(
    "options", [{}, {"do_center_crop": True}, {"resample": 0}, {"size": {"height": 7, "width": 7}}]
)
def test_keys_that_a_file_lacks_are_those_of_its_processor(tmp_path, kind, options):
    config = {"size": 13, "crop_size": 11, "image_mean": MEAN, "image_std": STD, **options}
    expected = pixels(getattr(transformers, f"{kind}ImageProcessorPil")(**config), picture())
    write(tmp_path, image_processor_type=f"{kind}ImageProcessorFast", **config)
    if expected.shape[1] != expected.shape[2]:
        with pytest.raises(CheckpointError, match="only squares .*'size': 13, 'do_center_crop': False"):
            ImageTransform.from_directory(tmp_path)
    else:
        torch.testing.assert_close(ImageTransform.from_directory(tmp_path)(picture()), expected)


def test_old_files_and_files_without_a_processor_are_read(tmp_path):
    config = {"size": 13, "crop_size": 11, "image_mean": MEAN, "image_std": STD}
    expected = pixels(CLIPImageProcessorPil(**config), picture())
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "resample": None, "do_pad": False}
    for names in ({}, old):
        got = ImageTransform.from_directory(write(tmp_path, **config, **names))(picture())
        torch.testing.assert_close(got, expected)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": 1}, r"json: resample must be 0, 2 or 3 for do_resize, got 1\.$"),
        ({"resample": "bicubic"}, "resample must be .* got 'bicubic'"),
        ({"size": {"longest_edge": 7}}, "size must be N, .* for do_resize, got {'longest_edge': 7}"),
        ({"size": {"shortest_edge": 7, "longest_edge": 9}}, "size must be .* 'longest_edge': 9}"),
        ({"size": {"width": 3}}, "size must be .* got {'width': 3}"),
        ({"size": [7, 7]}, r"size must be .* got \[7, 7\]"),
        ({"size": True}, "size must be .* got True"),
        ({"size": 0}, "size must be .* got 0"),
        ({"crop_size": None}, "crop_size must be .* for do_center_crop, got None"),
        (
            {"crop_size": {"height": 8, "width": 9}},
            r"only squares .* 'crop_size': {'height': 8, 'width': 9}}\.$",
        ),
        ({"crop_size": {"shortest_edge": 8}}, "only squares .* 'crop_size': {'shortest_edge': 8}"),
        (
            {"do_center_crop": False},
            "only squares .* {'do_resize': True, 'size': {'shortest_edge': 11}, 'do_center_crop': False",
        ),
        ({"do_center_crop": False, "do_resize": False}, "only squares .* {'do_resize': False"),
        (
            {"do_center_crop": False, "size": {"height": 5, "width": 7}},
            "'size': {'height': 5, 'width': 7}",
        ),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0 for do_rescale, got 0"),
        ({"image_mean": 0.5}, "image_mean must be three numbers for do_normalize, got 0.5"),
        ({"image_mean": "123"}, "image_mean must be three numbers for do_normalize, got '123'"),
        ({"image_std": [1, 0, 1]}, r"image_std must be three numbers above 0 .* got \[1, 0, 1\]"),
        ({"do_pad": True}, r"json: do_pad is not supported\.$"),
        (
            {"image_processor_type": "MllamaImageProcessor"},
            "image_processor_type .* got 'MllamaImageProcessor'",
        ),
        ({"resample": 1, "size": "x", "do_pad": True}, "do_pad .*; size .*; resample "),
    ],
    ids=str,
)
def test_unsupported_values_are_refused_by_key(tmp_path, options, message):
    config = {"size": {"shortest_edge": 11}, "crop_size": 11, "image_mean": MEAN, "image_std": STD}
    assert ImageTransform.from_directory(write(tmp_path, **config)).size == 11
    with pytest.raises(CheckpointError, match=message):
        ImageTransform.from_directory(write(tmp_path, **(config | options)))


def test_missing_and_empty_preprocessor_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json cannot be read"):
        ImageTransform.from_directory(tmp_path)
    with pytest.raises(
        CheckpointError, match="size must .*; crop_size must .*; image_mean must .*; image_std must"
    ):
        ImageTransform.from_directory(write(tmp_path))


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
    with pytest.raises(
        ConfigError, match="resample must be one of nearest, bilinear, bicubic, got 'lanczos'"
    ):
        ImageTransform(8, resample="lanczos")


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_any_mode_becomes_the_rgb_of_transformers(tmp_path, mode):
    image = picture().convert("RGBA")
    image.putalpha(picture().convert("L"))
    image.convert(mode).save(tmp_path / "x.tif")
    got = open_image(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        raw = CLIPImageProcessorPil().process_image(image, do_convert_rgb=True)
    np.testing.assert_array_equal(np.array(got).transpose(2, 0, 1), raw)


@pytest.mark.parametrize(
    ("dtype", "mode", "ending"),
    [("<u2", "I;16", "png"), ("<u2", "I;16", "tif"), (">u2", "I;16B", "tif"), ("<i4", "I", "tif")],
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path, dtype, mode, ending):
    ramp = np.arange(2**16, dtype=dtype).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    with Image.open(tmp_path / f"ramp.{ending}") as image:
        assert image.mode == mode
    got = np.array(open_image(tmp_path / f"ramp.{ending}"))
    assert got.mean() == 127.5
    np.testing.assert_allclose(got, np.repeat(ramp[..., None] / 257.0, 3, axis=2), rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("values", "mode"), [(0.5, "F"), (-1, "I"), (65536, "I")], ids=["real", "below 0", "beyond 16 bits"]
)
def test_values_of_no_known_range_are_refused(tmp_path, values, mode):
    Image.new(mode, (5, 3), values).save(tmp_path / "x.tif")
    with pytest.raises(
        DataError, match=rf"The image .*x\.tif cannot be opened: its mode {mode} has no known range"
    ):
        open_image(tmp_path / "x.tif")


def test_what_does_not_open_is_named(tmp_path):
    with pytest.raises(DataError, match=r"The image .*missing\.png cannot be opened: No such file"):
        open_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png is no image that can be opened"):
        open_image(tmp_path / "text.png")
    picture().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(DataError, match="cannot be opened: Is a directory"):
        open_image(tmp_path)


@pytest.mark.parametrize("damage", [struct.pack(">I", 5), struct.pack(">I", 2**31 + 1), b"\xff" * 8])
def test_a_damaged_later_chunk_is_named(tmp_path, damage):
    file = io.BytesIO()
    picture(211, 307).save(file, "PNG")
    data = bytearray(file.getvalue())
    second = data.index(b"IDAT", data.index(b"IDAT") + 4) - 4
    data[second : second + len(damage)] = damage
    (tmp_path / "damaged.png").write_bytes(data)
    with pytest.raises(DataError, match=r"^The image \S*damaged\.png cannot be opened: [^.]+\.$"):
        open_image(tmp_path / "damaged.png")


def test_the_encoders_own_transform_fits_it(tmp_path):
    write(tmp_path, size=13, crop_size=11, image_mean=MEAN, image_std=STD, rescale_factor=1 / 127.5)
    ImageTransform.from_directory(tmp_path).check(11, preprocessor=tmp_path)
    ImageTransform(11).check(11)
    ImageTransform(11).check(None, preprocessor=tmp_path / "nowhere")
    unscaled = write(tmp_path, size=13, crop_size=11, do_normalize=False, do_rescale=False)
    ImageTransform.from_directory(unscaled).check(preprocessor=unscaled)


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
