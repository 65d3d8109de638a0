"""Media of several encoders in one sequence: the tokens and masks are those of one encoder, taken apart."""

import random

import chats
import pytest
import torch
from chats import IMAGE

from torchfuse.data import ImageTransform, Media, MediaInput, Message, Sample, SampleTransform
from torchfuse.data.encoder_items import ItemFormats, options_of_model
from torchfuse.errors import ConfigError, DataError

PLACEHOLDERS = {"image": IMAGE, "sound": 5001}
FEATURES = 3
ENCODERS = dict.fromkeys(PLACEHOLDERS, FEATURES)


def read_sound(media):
    return MediaInput(torch.zeros(2, 5), keyword="waves")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    chats.save(folder, chats.byte_level())
    chats.save_image(folder / "a.png")
    return folder


def make(folder, image_token, features, **options):
    given = {"template": "chatml", "media_transforms": {"sound": read_sound}} | options
    images = {"image_transform": ImageTransform(8)}
    tokens = {"image_token": image_token, "features_per_image": features}
    return SampleTransform(folder, **images | tokens | given)


def conversation(folder, seed):
    """Turns with images and sounds anywhere."""
    draw = random.Random(seed)
    messages = []
    for turn in range(3):
        content = [f"question {turn}"]
        for _ in range(draw.randrange(4)):
            media = Media(folder / "a.png", modality=draw.choice([*PLACEHOLDERS]))
            content.insert(draw.randrange(len(content) + 1), media)
        messages += [Message("user", content), Message("assistant", [f"answer {turn}"])]
    return Sample(messages)


@pytest.mark.parametrize(
    ("layout", "scope"),
    [
        ("marker", "all"),
        ("marker", "last"),
        ("marker", "group"),
        ("placeholder", "all"),
        ("prefix", "all"),
    ],
)
def test_tokens_and_masks_are_those_of_one_encoder_taken_apart(folder, layout, scope):
    token = None if layout == "prefix" else IMAGE
    options = {"layout": layout, "scope": scope}
    whole = make(folder, token, FEATURES, **options)
    apart = make(folder, PLACEHOLDERS if layout == "placeholder" else token, ENCODERS, **options)
    for seed in range(20):
        sample = conversation(folder, seed)
        expected, got = whole(sample), apart(sample)
        assert [IMAGE if id == PLACEHOLDERS["sound"] else id for id in got["tokens"]] == expected[
            "tokens"
        ]
        assert got["labels"] == expected["labels"]
        assert apart.length(sample) == whole.length(sample)
        assert apart.decode(got["tokens"]) == whole.decode(expected["tokens"])
        features = [1 if media.modality == "image" else 2 for media in sample.media]
        is_image = torch.tensor([media.modality == "image" for media in sample.media], dtype=torch.bool)
        is_image = is_image.repeat_interleave(FEATURES * torch.tensor(features, dtype=torch.long))
        assert torch.equal(got["encoder_mask"]["image"], expected["encoder_mask"][:, is_image])
        assert torch.equal(got["encoder_mask"]["sound"], expected["encoder_mask"][:, ~is_image])
        assert len(got["images"]["image"]) + len(got["images"]["sound"]) == len(sample.media)


def test_placeholders_are_in_the_order_of_the_media(folder):
    apart = make(folder, PLACEHOLDERS, ENCODERS, layout="placeholder")
    media = [Media(folder / "a.png", modality=name) for name in ("sound", "image", "sound")]
    tokens = apart(Sample([Message("user", media), Message("assistant", ["a"])]))["tokens"]
    shown = [token for token in tokens if token in PLACEHOLDERS.values()]
    image, sound = PLACEHOLDERS.values()
    assert shown == [sound] * 2 * FEATURES + [image] * FEATURES + [sound] * 2 * FEATURES


def test_media_without_an_encoder(folder):
    given = {"media_transforms": {"sound": read_sound, "depth": read_sound}}
    apart = make(folder, IMAGE, ENCODERS, **given)
    depth = [Media(folder / "a.png", modality="depth")]
    sample = Sample([Message("user", depth), Message("assistant", ["a"])])
    message = "No encoder takes media of the modality depth: there are image, sound, each for"
    for call in (apart, apart.length):
        with pytest.raises(DataError, match=message):
            call(sample)
    one = make(folder, IMAGE, {"tower": 3}, **given)
    assert one(sample)["encoder_mask"]["tower"].shape[1] == 2 * 3


@pytest.mark.parametrize(
    ("token", "features", "options", "message"),
    [
        (
            IMAGE,
            {"image": 3, "audio": 4},
            {},
            r"No media are for audio: .* transforms for image, sound\.",
        ),
        (IMAGE, ENCODERS, {"image_transform": None}, r"No media are for image: .* for sound\."),
        (PLACEHOLDERS, 3, {}, "features_per_image must be too, got 3"),
        (PLACEHOLDERS, {"image": 3}, {}, "the same encoders, got image, sound and image"),
        (IMAGE, {}, {}, "the same encoders, got none and none"),
        (PLACEHOLDERS, ENCODERS, {"layout": "marker"}, rf"share one image_token, got \[{IMAGE}, 5001\]"),
        (
            PLACEHOLDERS,
            ENCODERS,
            {"layout": "prefix"},
            f"image_token={IMAGE} does not fit layout='prefix'",
        ),
    ],
)
def test_options_that_contradict_each_other(folder, token, features, options, message):
    with pytest.raises(ConfigError, match=message):
        make(folder, token, features, **options)


def test_a_number_of_features_that_the_model_lacks():
    own = {"layout": "prefix", "features_per_image": {"image": 4, "audio": None}}
    with pytest.raises(ConfigError, match="features_per_image must be given: for audio it is unknown"):
        options_of_model(own, {})
    got = options_of_model(own, {"features_per_image": 7})
    assert got["features_per_image"] == {"image": 4, "audio": 7}
    own["features_per_image"]["audio"] = 6
    with pytest.raises(ConfigError, match=r"features_per_image is 7, and the model's is \{'image': 4"):
        options_of_model(own, {"features_per_image": 7})


def test_videos_are_frames_for_the_encoder_of_images():
    assert ItemFormats(9, {"image": 1, "audio": 2}).encoder_of("video") == "image"
    assert ItemFormats(9, {"image": 1, "video": 2}).encoder_of("video") == "video"
