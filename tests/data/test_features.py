"""What identifies features: settings of transforms, and files by size and time."""

import functools
import os

import torch

from torchfuse.data import ImageTransform, Media, VideoTransform
from torchfuse.data.features import describe_settings, hash_file, list_differences


class Sound:
    def __init__(self, rate, window):
        self.rate, self._window, self.parent = rate, window, self

    def read(self, media):
        return self._window


def test_settings_of_transforms_of_the_users_own():
    def differences(one, other):
        return list_differences(describe_settings({"x": one}), describe_settings({"x": other}))

    window = torch.ones(5)
    assert differences(Sound(8, window), Sound(8, window.clone())) == []
    assert differences(Sound(8, window), Sound(9, window)) == ["x.rate was 8, and is 9"]
    [changed] = differences(Sound(8, window), Sound(8, window * 2))
    assert changed.startswith("x.window was [5] ")
    assert differences(Sound(8, window).read, Sound(9, window).read) == ["x.of.rate was 8, and is 9"]
    [named] = differences(torch.tanh, os.path.join)
    assert named.endswith("tanh, and is posixpath.join")
    bound = [functools.partial(Sound, window=size) for size in (2, 3)]
    assert differences(*bound) == ["x.window was 2, and is 3"]
    videos = [VideoTransform(ImageTransform(side), fps=2) for side in (8, 9)]
    found = differences(*videos)
    assert "x.image_transform.height was 8, and is 9" in found
    assert not any("fps" in line for line in found)


def test_a_file_is_identified_by_path_span_size_and_time(tmp_path):
    file = tmp_path / "a.tar"
    file.write_bytes(b"abcdef")
    os.utime(file, ns=(0, 10**9))
    first = hash_file(Media(file))
    assert first == hash_file(Media(file, name="other"))
    others = {hash_file(Media(file, span=span)) for span in ((0, 2), (2, 2))}
    os.utime(file, ns=(0, 10**9 + 1))
    others.add(hash_file(Media(file)))
    file.write_bytes(b"abcdefg")
    os.utime(file, ns=(0, 10**9))
    others.add(hash_file(Media(file)))
    assert len(others | {first}) == 5
    assert hash_file(Media(data=b"abc")) is None
    assert hash_file(Media(tmp_path / "missing")) is None
