"""Image files become upright RGB."""

import io
import struct

import numpy as np
import pytest
from pictures import picture
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image

from torchfuse.data.images import image_size, open_image
from torchfuse.data.samples import Media
from torchfuse.errors import DataError


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_the_orientation_of_photographs_is_applied(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    picture(23, 17).save(path, exif=exif)
    expected = np.array(load_image(str(path)))
    np.testing.assert_array_equal(np.array(open_image(path)), expected)
    assert image_size(path) == expected.shape[:2]
    assert (expected.shape[:2] == (23, 17)) == (orientation > 4)


def test_images_of_samples_are_opened_from_bytes_and_archives(tmp_path):
    file = io.BytesIO()
    picture().save(file, "PNG")
    content = file.getvalue()
    (tmp_path / "x.png").write_bytes(content)
    (tmp_path / "x.tar").write_bytes(b"head" + content + b"tail")
    for media in (
        Media(tmp_path / "x.png"),
        Media(data=content),
        Media(tmp_path / "x.tar", span=(4, len(content)), name="x.tar: x.png"),
    ):
        np.testing.assert_array_equal(np.array(open_image(media)), np.array(picture()))
        assert image_size(media) == (17, 23)
    with pytest.raises(DataError, match=r"^The image x\.tar: y cannot be opened: .*truncated"):
        open_image(Media(tmp_path / "x.tar", span=(4, 200), name="x.tar: y"))
    with pytest.raises(DataError, match=r"^4 bytes is no image"):
        image_size(Media(data=b"text"))
    with pytest.raises(DataError, match=r"^The image gone\.tar cannot be read: No such file"):
        open_image(Media(tmp_path / "gone.tar", span=(0, 1), name="gone.tar"))


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
