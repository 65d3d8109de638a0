"""Directories of transformers' image processors, in every form that a version of it writes."""

import json

import pytest
import torch
import transformers
from pictures import picture, write
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoImageProcessor, CLIPImageProcessorPil, PreTrainedTokenizerFast

from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform, find_processor
from torchfuse.errors import CheckpointError

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
NUMBERS = {"image_mean": MEAN, "image_std": STD}
GRIDS = [[14, 28], [28, 14], [28, 28], [42, 14], [14, 42]]
PROCESSORS = {
    "CLIP": {"size": 13, "crop_size": 11},
    "Siglip": {"size": {"height": 13, "width": 13}},
    "ViT": {"size": 13},
    "DeiT": {"size": 13, "crop_size": 11},
    "Bit": {"size": 13, "crop_size": 11},
    "Blip": {"size": 13},
    "ConvNext": {"size": {"shortest_edge": 13}, "crop_pct": 0.7},
    "Llava": {"size": 13, "crop_size": 11, "do_pad": True},
    "Mllama": {"size": {"height": 14, "width": 14}, "max_image_tiles": 3},
    "LlavaNext": {"size": {"shortest_edge": 14}, "crop_size": 14, "image_grid_pinpoints": GRIDS},
}
SIZES = [(23, 17), (17, 24), (13, 13), (14, 42), (71, 5), (3, 29), (97, 101)]


def pixels(processor, image):
    values = processor(image, return_tensors="pt")["pixel_values"].float()
    return values[0, 0] if values.dim() == 6 else values[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_processor_of_a_directory(tmp_path, kind, size):
    getattr(transformers, f"{kind}ImageProcessorPil")(**NUMBERS, **PROCESSORS[kind]).save_pretrained(
        tmp_path
    )
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    transform, image = ImageTransform.from_directory(tmp_path), picture(*size)
    got, expected = transform(image), pixels(processor, image)
    if kind == "Mllama":  # pads to the most tiles
        assert not expected[len(got) :].any()
        expected = expected[: len(got)]
    assert torch.equal(got, expected)
    assert transform.num_items((image.height, image.width)) == (len(got) if got.dim() == 4 else 1)
    assert transform.media_input(image).num_items == transform.num_items((image.height, image.width))


@pytest.mark.parametrize("size", [(23, 17), (17, 24), (13, 13)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"size": {"shortest_edge": 384}}, {"size": {"shortest_edge": 13}, "do_convert_rgb": True}],
    ids=str,
)
def test_convnext_crops_small_images_only(tmp_path, options, size):
    processor = transformers.ConvNextImageProcessorPil(**NUMBERS, **options)
    processor.save_pretrained(tmp_path)
    image = picture(*size)
    assert torch.equal(ImageTransform.from_directory(tmp_path)(image), pixels(processor, image))


@pytest.mark.parametrize("kind", ["Llava", "Mllama", "LlavaNext"])
def test_processors_of_text_and_images(tmp_path, kind):
    image_processor = getattr(transformers, f"{kind}ImageProcessorPil")(**NUMBERS, **PROCESSORS[kind])
    image_processor.save_pretrained(tmp_path / "images")
    tokenizer = Tokenizer(WordLevel({"a": 0, "<image>": 1, "<|image|>": 2, "<s>": 3}, "a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    processor = getattr(transformers, f"{kind}Processor")(image_processor, tokenizer)
    processor.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both" / "preprocessor_config.json").exists()
    assert find_processor(tmp_path / "both").name == "processor_config.json"
    transform = ImageTransform.from_directory(tmp_path / "both")
    alone = ImageTransform.from_directory(tmp_path / "images")
    assert type(transform) is type(alone)
    assert torch.equal(transform(picture()), alone(picture()))
    max_tiles = getattr(transform, "max_tiles", None)
    transform.check(transform.size, max_tiles=max_tiles, preprocessor=tmp_path / "both")
    other = ImageTransform(transform.size, [0.1, 0.2, 0.31], STD)
    with pytest.raises(ValueError, match=r"mean is \[0\.1, 0\.2, 0\.31\], the encoder's"):
        other.check(preprocessor=tmp_path / "both")


def test_settings_beside_the_text_come_first(tmp_path):
    write(tmp_path, **NUMBERS, size=13, crop_size=11)
    nested = tmp_path / "processor_config.json"
    nested.write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    assert ImageTransform.from_directory(tmp_path).size == 11
    nested.write_text(json.dumps({"image_processor": {**NUMBERS, "size": 13, "crop_size": 7}}))
    assert ImageTransform.from_directory(tmp_path).size == 7


@pytest.mark.parametrize("kind", ["CLIP", "Bit", "Siglip", "Blip", "DeiT", "ViT"])
@pytest.mark.parametrize(
    "options", [{}, {"do_center_crop": True}, {"resample": 0}, {"size": {"height": 7, "width": 7}}]
)
def test_keys_that_a_file_lacks_are_those_of_its_processor(tmp_path, kind, options):
    config = {"size": 13, "crop_size": 11, "image_mean": MEAN, "image_std": STD, **options}
    expected = pixels(getattr(transformers, f"{kind}ImageProcessorPil")(**config), picture())
    write(tmp_path, image_processor_type=f"{kind}ImageProcessorFast", **config)
    if expected.shape[1] != expected.shape[2]:
        with pytest.raises(CheckpointError, match="of one size .*'size': 13, 'do_center_crop': False"):
            ImageTransform.from_directory(tmp_path)
    else:
        assert torch.equal(ImageTransform.from_directory(tmp_path)(picture()), expected)


def test_old_files_and_files_without_a_processor_are_read(tmp_path):
    config = {"size": 13, "crop_size": 11, "image_mean": MEAN, "image_std": STD}
    expected = pixels(CLIPImageProcessorPil(**config), picture())
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "resample": None, "do_pad": False}
    for names in ({}, old):
        got = ImageTransform.from_directory(write(tmp_path, **config, **names))(picture())
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": 9}, r"json: resample must be one of 0, 1, 2.* for do_resize, got 9\.$"),
        ({"resample": "bicubic"}, "resample must be .* got 'bicubic'"),
        ({"size": {"longest_edge": 7}}, "size must be N, .* for do_resize, got {'longest_edge': 7}"),
        ({"size": {"shortest_edge": 7, "longest_edge": 9}}, "size must be .* 'longest_edge': 9}"),
        ({"size": {"width": 3}}, "size must be .* got {'width': 3}"),
        ({"size": [7, 7]}, r"size must be .* got \[7, 7\]"),
        ({"size": True}, "size must be .* got True"),
        ({"size": 0}, "size must be .* got 0"),
        ({"crop_size": None}, "crop_size must be .* for do_center_crop, got None"),
        ({"crop_size": {"shortest_edge": 8}}, "crop_size must be .* got {'shortest_edge': 8}"),
        (
            {"do_center_crop": False},
            "images of one size .* {'do_resize': True, 'size': {'shortest_edge': 11}, 'do_center_crop': False",
        ),
        ({"do_center_crop": False, "do_resize": False}, "images of one size .* {'do_resize': False"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0 for do_rescale, got 0"),
        ({"image_mean": 0.5}, "image_mean must be three numbers for do_normalize, got 0.5"),
        ({"image_mean": "123"}, "image_mean must be three numbers for do_normalize, got '123'"),
        ({"image_std": [1, 0, 1]}, r"image_std must be three numbers above 0 .* got \[1, 0, 1\]"),
        ({"do_pad": True}, r"json: do_pad is not supported\.$"),
        (
            {"image_processor_type": "Qwen2VLImageProcessor"},
            "image_processor_type must be one of CLIP, .* got 'Qwen2VLImageProcessor'",
        ),
        ({"resample": 9, "size": "x", "do_pad": True}, "do_pad .*; resample .*; size"),
    ],
    ids=str,
)
def test_unsupported_values_are_refused_by_key(tmp_path, options, message):
    config = {"size": {"shortest_edge": 11}, "crop_size": 11, "image_mean": MEAN, "image_std": STD}
    assert ImageTransform.from_directory(write(tmp_path, **config)).size == 11
    with pytest.raises(CheckpointError, match=message):
        ImageTransform.from_directory(write(tmp_path, **(config | options)))


def test_missing_and_empty_preprocessor_files_are_named(tmp_path):
    with pytest.raises(
        CheckpointError,
        match=r"no image processor: expected preprocessor_config\.json, or processor_config",
    ):
        ImageTransform.from_directory(tmp_path)
    with pytest.raises(
        CheckpointError, match="image_mean must .*; image_std must .*; size must .*; crop_size must "
    ):
        ImageTransform.from_directory(write(tmp_path))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Mllama", {"size": {"shortest_edge": 14}}, "size must be a square, got {'shortest_edge': 14}"),
        ("Mllama", {"size": {"height": 14, "width": 7}}, "size must be a square"),
        (
            "Mllama",
            {"max_image_tiles": 0, "do_pad": False},
            "tiles need do_pad; max_image_tiles must be an integer above 0, got 0",
        ),
        ("Mllama", {"do_thumbnail": True}, "do_thumbnail is not supported"),
        ("LlavaNext", {"crop_size": 7}, "size and crop_size must be one square"),
        (
            "LlavaNext",
            {"image_grid_pinpoints": [[14, 27]]},
            r"resolutions .* multiples of 14, got \[\[14, 27\]\]",
        ),
        ("LlavaNext", {"image_grid_pinpoints": []}, "image_grid_pinpoints must be"),
        (
            "LlavaNext",
            {"image_mean": None, "size": "x"},
            "image_mean .*; size must be",
        ),
        ("ConvNext", {"size": {"height": 7, "width": 7}}, "size must be {shortest_edge: N}"),
        ("ConvNext", {"crop_pct": 0}, r"crop_pct must be a number in \(0, 1\], got 0"),
        ("ConvNext", {"do_center_crop": True, "crop_size": 7}, "do_center_crop is not supported"),
        ("Siglip2", {}, "image_processor_type must be one of .*, got 'Siglip2ImageProcessor'"),
    ],
)
def test_steps_of_a_processor_that_are_not_supported(tmp_path, kind, options, message):
    config = NUMBERS | PROCESSORS.get(kind, {}) | {"do_pad": None} | options
    with pytest.raises(CheckpointError, match=message):
        ImageTransform.from_directory(
            write(tmp_path, image_processor_type=f"{kind}ImageProcessor", **config)
        )


def test_a_class_that_does_not_fit_the_processor(tmp_path):
    write(tmp_path, **NUMBERS, size=13, crop_size=11)
    with pytest.raises(
        CheckpointError, match="CLIPImageProcessor is read by ImageTransform, not by Tiled"
    ):
        TiledImageTransform.from_directory(tmp_path)
    write(tmp_path, image_processor_type="LlavaNextImageProcessor", **NUMBERS, **PROCESSORS["LlavaNext"])
    assert isinstance(GridImageTransform.from_directory(tmp_path), GridImageTransform)
