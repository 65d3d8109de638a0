"""Media of every modality are read by their transforms; sounds train a tower of the user's own."""

import io
import json
import wave

import av
import numpy as np
import pytest
import torch
from pictures import picture, write
from PIL import Image
from prompt_settings import tokenizer
from support import IMAGE, TinyEncoder, tiny_decoder

from torchfuse import fuse
from torchfuse.data import padded_collate_images
from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform
from torchfuse.data.media import MediaInput
from torchfuse.data.media_reader import MediaReader
from torchfuse.data.readers import read_samples
from torchfuse.data.samples import Media
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError, DataError
from torchfuse.training import next_token_loss

WINDOW = 5  # samples of a sound that are one item


def wav(seconds, pitch):
    """A WAV file of a pure tone, as bytes."""
    levels = 2e4 * np.sin(pitch * np.arange(int(seconds * 100)))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(100)
        sound.writeframes(levels.astype("<i2").tobytes())
    return file.getvalue()


def audio(seconds, pitch):
    return Media(data=wav(seconds, pitch), modality="audio")


def windows(media):
    """A user's transform: windows of a sound, as a ``TinyEncoder`` takes them."""
    with wave.open(io.BytesIO(media.read())) as sound:
        levels = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32)
    return MediaInput(torch.from_numpy(levels / 2**15).unflatten(0, (-1, WINDOW)), keyword="x")


class Windows:
    """The same as a class, for a configuration."""

    def __init__(self, window):
        self.window = window

    def __call__(self, media):
        return windows(media)

    def num_items(self, media):
        return 1000 + self.window


# With two sounds of different lengths, with one, with another of the same length, with none.
ROWS = [
    ([("a", 0.2, 0.3), ("b", 0.35, 1.1)], "w4"),
    ([("c", 0.15, 0.7)], "w5"),
    ([("d", 0.15, 1.9)], "w6"),
    ([], "w9"),
]
ARCHS = {
    "cross_attention": {"every": 1, "fusion_vocab_size": 1},
    "placeholder": {"arch": "joint_decoder", "placement": "placeholder", "encoder_token": IMAGE},
    "prefix": {"arch": "joint_decoder"},
}


@pytest.mark.parametrize("name", ARCHS)
def test_a_tower_of_sounds_trains(tmp_path, name):
    records = []
    for sounds, answer in ROWS:
        for file, *tone in sounds:
            (tmp_path / f"{file}.wav").write_bytes(wav(*tone))
        question = {"from": "human", "value": "<audio> " * len(sounds) + "w7 w8"}
        turns = [question, {"from": "gpt", "value": answer}]
        records.append({"audio": [f"{file}.wav" for file, *_ in sounds], "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(records))
    trained = {"encoder_trainable": True, "decoder_trainable": True}
    model = fuse(tiny_decoder(), TinyEncoder(WINDOW), **trained, **ARCHS[name])
    transform = SampleTransform.for_model(
        model,
        tokenizer(tmp_path / "words"),
        None,
        features_per_image=1,
        media_transforms={"audio": f"{__name__}:windows"},
    )
    rows = [transform(sample) for sample in read_samples(tmp_path / "rows.json")]
    batch = padded_collate_images(rows)
    assert batch["encoder_input"]["x"].shape == (4, 4 + 7, WINDOW)
    labels = batch.pop("labels")
    logits = model(**batch)
    for row, sample in enumerate(rows):
        alone = padded_collate_images([sample])
        del alone["labels"]
        alone = model(**alone)[0, : len(sample["tokens"])]
        torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(60):
        losses.append(next_token_loss(model(**batch), labels)[0])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():  # of the second and third sample, nothing but the sound differs
        batch["encoder_input"]["x"] = batch["encoder_input"]["x"][[0, 2, 1, 3]]
        assert next_token_loss(model(**batch), labels)[0] > 2 * losses[-1]


def test_images_and_videos(tmp_path):
    write(tmp_path, size=13, crop_size=11, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    picture(23, 17).save(tmp_path / "x.png")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 32, 16
        for level in (0, 90, 180):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 16), (level, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = MediaReader(tmp_path, {"video": {"num_frames": 3}})
    image, video = Media(tmp_path / "x.png"), Media(tmp_path / "v.mp4", modality="video")
    expected = ImageTransform.from_directory(tmp_path)(picture(23, 17))
    assert torch.equal(reader(image).items, expected[None])
    assert reader(video).items.shape == (3, 3, 11, 11)
    red = reader(video).items[:, 0].mean((1, 2))
    assert red.diff().min() > 0.3
    assert (reader.num_items(image), reader.num_items(video)) == (1, 3)


@pytest.mark.parametrize(
    "transform",
    [TiledImageTransform(8, max_tiles=6), GridImageTransform(8, resolutions=[(8, 24), (16, 16)])],
    ids=lambda transform: type(transform).__name__,
)
def test_tiles_are_counted_without_decoding(tmp_path, transform):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    picture(40, 13).save(tmp_path / "x.jpg", exif=exif)
    reader, media = MediaReader(transform), Media(tmp_path / "x.jpg")
    made = reader(media)
    assert made.size == (40, 13)
    assert reader.num_items(media) == made.num_items == len(made.items) > 1
    content = (tmp_path / "x.jpg").read_bytes()
    assert reader.num_items(Media(data=content[:-99])) == made.num_items


def test_an_image_that_its_transform_refuses_is_named(tmp_path):
    Image.new("RGB", (1, 17_000)).save(tmp_path / "narrow.png")
    with pytest.raises(DataError, match=r"narrow\.png cannot be used: .* is too narrow"):
        MediaReader(ImageTransform(224))(Media(tmp_path / "narrow.png"))


def test_transforms_in_a_configuration():
    section = {"_component_": f"{__name__}:Windows", "window": 3}
    path = f"{__name__}:windows"
    for given in (section, path):
        reader = MediaReader(None, {"audio": given})
        assert torch.equal(reader(audio(0.2, 0.3)).items, windows(audio(0.2, 0.3)).items)
    assert MediaReader(None, {"audio": section}).num_items(audio(0.2, 0.3)) == 1003
    assert MediaReader(None, {"audio": path}).num_items(audio(0.2, 0.3)) == 4


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"audio": "nowhere.windows"}, "audio: there is no component 'nowhere.windows'"),
        ({"audio": {"window": 3}}, "audio must name its _component_"),
        ({"audio": 3}, "audio must be a function of a Media, got 3"),
        ({"audio": {"_component_": f"{__name__}:Windows"}}, "missing option 'window'"),
        ({"video": {"num_frames": 3}}, "video: frames need image_transform"),
        ({"image": windows}, "transform of images is image_transform"),
    ],
)
def test_configurations_that_are_wrong(others, message):
    with pytest.raises(ConfigError, match=message):
        MediaReader(None, others)


def test_options_of_a_video_are_checked():
    with pytest.raises(ConfigError, match="video: unknown option 'frames'; it takes fps, num_frames"):
        MediaReader(ImageTransform(8), {"video": {"frames": 3}})


def test_media_without_a_transform_and_wrong_results():
    reader = MediaReader(ImageTransform(8), {"audio": lambda media: [1.0]})
    with pytest.raises(
        DataError, match="The smell 3 bytes cannot be read: there are transforms for image, a"
    ):
        reader(Media(data=b"abc", modality="smell"))
    with pytest.raises(
        DataError, match="The image 3 bytes cannot be read: there are transforms for nothing"
    ):
        MediaReader(None)(Media(data=b"abc"))
    with pytest.raises(ConfigError, match="transform of audio must return a tensor or a .*, got a list"):
        reader(Media(data=b"abc", modality="audio"))
