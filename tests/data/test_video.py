"""Clips of video files are the frames that PyAV decodes at their times."""

import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform
from torchfuse.data.media import collate_media
from torchfuse.data.samples import Media
from torchfuse.data.video import VideoTransform, read_frames
from torchfuse.encoders import RandomEncoder
from torchfuse.errors import ConfigError, DataError

FORMATS = [
    ("mp4", "libx264", "yuv420p"),  # with B-frames
    ("mkv", "libx264", "yuv420p"),
    ("mov", "mpeg4", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("ts", "mpeg2video", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("gif", "gif", "rgb8"),
]
IMAGES = ImageTransform(16, [0.0] * 3, [1.0] * 3, resize=[])


def video(path, codec="libx264", pixels="yuv420p", *, frames=41, rate=10, gop=7):
    """Write a video of frames that differ from each other, with several key frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, pixels, gop
        for i in range(frames):
            picture = np.zeros((32, 48, 3), np.uint8)
            picture[:, : i + 1, 0], picture[..., 1] = 250, 5 * i
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return Media(path, modality="video")


def decoded(media):
    """All frames of a video, with their times from its start."""
    with av.open(str(media.path)) as container:
        frames = list(container.decode(video=0))
        start = frames[0].pts
        return [((f.pts - start) * f.time_base, f.to_ndarray(format="rgb24")) for f in frames]


@pytest.mark.parametrize(
    "options", [{"fps": 3}, {"fps": 30}, {"num_frames": 5}, {"fps": 9, "num_frames": 11}]
)
@pytest.mark.parametrize(("ending", "codec", "pixels"), FORMATS)
def test_frames_are_those_that_pyav_decodes_at_their_times(tmp_path, ending, codec, pixels, options):
    media = video(tmp_path / f"v.{ending}", codec, pixels)
    frames = decoded(media)
    sampler = VideoTransform(IMAGES, **options)
    times = sampler.times(Fraction(41, 10))
    half_a_ms = Fraction(1, 2000)
    expected = [[x for t, x in frames if t <= time + half_a_ms][-1] for time in times]
    got = list(read_frames(media, sampler.times))
    assert len(got) == sampler.num_items(media) == sampler(media).num_items == len(times)
    for image, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.array(image), right)
    if max(options.values()) < 10:
        assert len({image.tobytes() for image in got}) == len(times)


@pytest.mark.parametrize(("rate", "tick"), [(Fraction(30000, 1001), "mkv"), (30, "mkv"), (24, "webm")])
def test_a_clip_at_the_rate_of_the_file_has_each_frame_once(tmp_path, rate, tick):
    codec = {"mkv": "libx264", "webm": "libvpx-vp9"}[tick]
    media = video(tmp_path / f"v.{tick}", codec, rate=rate)
    got = read_frames(media, VideoTransform(IMAGES, fps=float(rate)).times)
    for image, (_, right) in zip(got, decoded(media), strict=True):
        np.testing.assert_array_equal(np.array(image), right)


def test_times_by_definition():
    by_number = VideoTransform(IMAGES, num_frames=4).times(Fraction(8))
    assert by_number == [1, 3, 5, 7]
    assert VideoTransform(IMAGES, fps=2).times(Fraction(7, 4)) == [0, 0.5, 1, 1.5]
    assert VideoTransform(IMAGES, fps=2, num_frames=4).times(Fraction(8)) == by_number
    assert VideoTransform(IMAGES, fps=0.01).times(Fraction(8)) == [0]


def test_bytes_and_members_of_archives(tmp_path):
    media = video(tmp_path / "v.mp4")
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.tar").write_bytes(b"head" + content + b"tail")
    sampler = VideoTransform(IMAGES, num_frames=3)
    expected = sampler(media)
    assert expected.items.shape == (3, 3, 16, 16)
    for same in (
        Media(data=content, modality="video"),
        Media(tmp_path / "v.tar", span=(4, len(content)), modality="video"),
    ):
        assert torch.equal(sampler(same).items, expected.items)


@pytest.mark.parametrize("axes", [(1, 0, 0, 1), (0, 1, 1, 0)])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_frames_are_turned_and_mirrored_as_they_are_displayed(tmp_path, axes, signs):
    media = video(tmp_path / "v.mp4")
    (plain,) = (np.array(image) for image in read_frames(media, lambda _: [Fraction(1)]))
    a, b, c, d = (axis * sign for axis, sign in zip(axes, (*signs, *signs)[:4], strict=True))
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(
        ">9i", *(value << 16 for value in (a, b, 0, c, d, 0, 0, 0)), 1 << 30
    )
    (tmp_path / "turned.mp4").write_bytes(content)
    (turned,) = read_frames(Media(tmp_path / "turned.mp4", modality="video"), lambda _: [Fraction(1)])
    # (x, y) of the file is displayed at (a x + c y, b x + d y)
    y, x = np.indices(plain.shape[:2])
    to_x, to_y = a * x + c * y, b * x + d * y
    displayed = np.zeros_like(plain, shape=(np.ptp(to_y) + 1, np.ptp(to_x) + 1, 3))
    displayed[to_y - to_y.min(), to_x - to_x.min()] = plain
    np.testing.assert_array_equal(np.array(turned), displayed)


def test_clips_and_images_of_a_row_go_to_one_encoder(tmp_path):
    media = video(tmp_path / "v.mp4")
    clip, image = (
        VideoTransform(IMAGES, num_frames=3)(media),
        IMAGES.media_input(Image.new("RGB", (20, 16))),
    )
    inputs, real = collate_media([[image, clip], [image]])
    encoder = RandomEncoder(num_tokens=2, feature_dim=5)
    features = encoder(inputs["images"])
    assert features.shape == (2, 4 * 2, 5)
    assert real.repeat_interleave(2, -1).shape == features.shape[:2]
    alone = encoder(clip.items[None])[0]
    torch.testing.assert_close(features[0, 2:], alone)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("ending", "codec"),
    [
        ("mp4", "mpeg4"),
        ("ts", "mpeg2video"),
        ("mkv", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
    ],
)
def test_a_file_that_is_cut_off(tmp_path, ending, codec, kept):
    media = video(tmp_path / f"v.{ending}", codec)
    content = media.path.read_bytes()
    media.path.write_bytes(content[: int(kept * len(content))])
    sampler = VideoTransform(IMAGES, num_frames=3)
    if ending == "ts":  # a stream, which may end anywhere
        assert sampler(media).num_items == 3
        return
    with pytest.raises(DataError, match=rf"^The video {media.path} cannot be decoded: .+\.$"):
        sampler(media)


def test_what_does_not_decode_is_named(tmp_path):
    sampler = VideoTransform(IMAGES, num_frames=3)
    with pytest.raises(
        DataError, match=r"^The video \S*gone\.mp4 cannot be decoded: No such file or dir"
    ):
        sampler(Media(tmp_path / "gone.mp4", modality="video"))
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(DataError, match=r"text\.mp4 cannot be decoded: Invalid data"):
        sampler(Media(tmp_path / "text.mp4", modality="video"))
    with pytest.raises(DataError, match=r"^The video 0 bytes cannot be decoded: "):
        sampler(Media(data=b"", modality="video"))
    raw = video(tmp_path / "v.h264")
    with pytest.raises(DataError, match=r"v\.h264 cannot be decoded: its frames have no times"):
        sampler(raw)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(DataError, match=r"sound\.wav cannot be decoded: it has no pictures"):
        sampler(Media(tmp_path / "sound.wav", modality="video"))


def test_options_that_are_wrong():
    for options, message in (
        ({}, "needs fps, num_frames or both"),
        ({"fps": 0}, "fps must be above 0 .* got fps=0, num_frames=None"),
        ({"fps": float("nan")}, "got fps=nan"),
        ({"fps": float("inf")}, "got fps=inf"),
        ({"num_frames": 0}, "num_frames at least 1, got fps=None, num_frames=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            VideoTransform(IMAGES, **options)
    for tiles in (TiledImageTransform(8), GridImageTransform(8, resolutions=[(8, 16)])):
        with pytest.raises(ConfigError, match=f"whole images: .*, not {type(tiles).__name__}"):
            VideoTransform(tiles, fps=1)


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"need PyAV: pip install 'torchfuse\[video\]'"):
        VideoTransform(IMAGES, fps=1)
