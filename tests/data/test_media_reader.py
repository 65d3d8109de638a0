"""Media of every modality are read by their transforms; sounds train a tower of the user's own."""

import io
import wave

import av
import numpy as np
import pytest
import torch
from models.architectures import ARCHS, in_place, make
from pictures import picture, write
from PIL import Image
from support import IMAGE, TinyEncoder

from torchfuse.data import padded_collate_images
from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform
from torchfuse.data.media import MediaInput
from torchfuse.data.media_reader import MediaReader
from torchfuse.data.samples import Media
from torchfuse.errors import ConfigError, DataError

WINDOW = 5  # samples of a sound that are one item


def sound(seconds, pitch):
    """A WAV file of a pure tone, as bytes."""
    levels = 2e4 * np.sin(pitch * np.arange(int(seconds * 100)))
    file = io.BytesIO()
    with wave.open(file, "wb") as wav:
        wav.setnchannels(1)
        wav.setsampwidth(2)
        wav.setframerate(100)
        wav.writeframes(levels.astype("<i2").tobytes())
    return Media(data=file.getvalue(), modality="sound")


def windows(media):
    """A user's transform: windows of a sound, as a ``TinyEncoder`` takes them."""
    with wave.open(io.BytesIO(media.read())) as wav:
        levels = np.frombuffer(wav.readframes(wav.getnframes()), "<i2").astype(np.float32)
    return MediaInput(torch.from_numpy(levels / 2**15).unflatten(0, (-1, WINDOW)), keyword="x")


class Windows:
    """The same as a class, for a configuration."""

    def __init__(self, window):
        self.window = window

    def __call__(self, media):
        return windows(media)

    def num_items(self, media):
        return 1000 + self.window


def samples(placeholders):
    """Samples with two sounds, one and none, of different lengths."""
    reader = MediaReader(None, {"sound": windows})
    rows = []
    for sounds in ([(0.2, 0.3), (0.35, 1.1)], [(0.1, 0.7)], []):
        media = [reader(sound(*each)) for each in sounds]
        items = sum(each.num_items for each in media)
        tokens = [3, *[IMAGE] * (items if placeholders else 0), 7, 11]
        labels = [-100, *[-100] * (len(tokens) - 2), 11]
        mask = torch.ones(len(tokens), items, dtype=torch.bool)
        rows.append({"tokens": tokens, "labels": labels, "images": media, "encoder_mask": mask})
    return rows


@pytest.mark.parametrize(
    "name", [name for name in ARCHS if "moma" not in name]
)  # which balances a batch
def test_sounds_train_a_tower_through_transform_collation_and_fusion(name):
    model = make(name, encoder=TinyEncoder(WINDOW))
    rows = samples(in_place(name))
    batch = padded_collate_images(rows)
    assert batch["encoder_input"]["x"].shape == (3, 4 + 7, WINDOW)
    labels = batch.pop("labels")
    logits = model(**batch)
    for row, sample in enumerate(rows):
        alone = padded_collate_images([sample])
        del alone["labels"]
        length = len(sample["tokens"])
        torch.testing.assert_close(
            logits[row, :length], model(**alone)[0, :length], rtol=1e-4, atol=1e-5
        )
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    assert model.encoder.layers[0].weight.grad.abs().sum() > 0
    batch["encoder_input"]["x"] = batch["encoder_input"]["x"].flip(-1)
    moved = (model(**batch) - logits).abs().flatten(1).amax(1)
    assert (moved[:2] > 1e-4).all() and moved[2] < 1e-6  # the last row hears nothing


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


def test_transforms_in_a_configuration():
    section = {"_component_": f"{__name__}:Windows", "window": 3}
    path = f"{__name__}:windows"
    for given in (section, path):
        reader = MediaReader(None, {"sound": given})
        assert torch.equal(reader(sound(0.2, 0.3)).items, windows(sound(0.2, 0.3)).items)
    assert MediaReader(None, {"sound": section}).num_items(sound(0.2, 0.3)) == 1003
    assert MediaReader(None, {"sound": path}).num_items(sound(0.2, 0.3)) == 4


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"sound": "nowhere.windows"}, "sound: there is no component 'nowhere.windows'"),
        ({"sound": {"window": 3}}, "sound must name its _component_"),
        ({"sound": 3}, "sound must be a function of a Media, got 3"),
        ({"sound": {"_component_": f"{__name__}:Windows"}}, "missing option 'window'"),
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
    reader = MediaReader(ImageTransform(8), {"sound": lambda media: [1.0]})
    with pytest.raises(
        DataError, match="The smell 3 bytes cannot be read: there are transforms for image, s"
    ):
        reader(Media(data=b"abc", modality="smell"))
    with pytest.raises(
        DataError, match="The image 3 bytes cannot be read: there are transforms for nothing"
    ):
        MediaReader(None)(Media(data=b"abc"))
    with pytest.raises(ConfigError, match="transform of sound must return a tensor or a .*, got a list"):
        reader(Media(data=b"abc", modality="sound"))
