"""Video files as clips: frames at chosen times, decoded by PyAV.

The frame at a time is the one that is displayed then. Times are compared to half a millisecond, because
some containers round times of frames to whole ones. Where the file has an index, only what is needed is
decoded: from the key frame before a frame that is wanted.
"""

from __future__ import annotations

import io
import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import torch
from PIL import Image

from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform
from torchfuse.data.media import MediaInput
from torchfuse.data.samples import Media
from torchfuse.errors import ConfigError, DataError, FusionError

__all__ = ["VideoTransform", "read_frames"]

_ROUNDING: Final = Fraction(1, 2000)  # seconds
# By the signs of a display matrix, which puts (x, y) to (a * x + c * y, b * x + d * y): a, b, c, d.
_TRANSPOSED: Final = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
_HEAD: Final = 4096  # bytes
_INDEXED: Final = {"mp4", "matroska", "avi"}  # names of containers in which a key frame can be found


class VideoTransform:
    """Turn a video file into frames as an encoder takes them; a media transform.

    Args:
        image_transform: turns a frame into pixels.
        fps: frames for each second, the first at 0 s.
        num_frames: with ``fps``, the most frames that a clip has; a longer video has this number at
            equal distances. Without it, the number of every clip. Equal distances are the middles of as
            many equal parts.

    Raises:
        ConfigError: if neither is given or one is out of range, for an ``image_transform`` with tiles,
            or if PyAV is missing.

    Examples:
        >>> sampler = VideoTransform(ImageTransform(8), fps=1, num_frames=4)
        >>> [float(time) for time in sampler.times(Fraction(3))]
        [0.0, 1.0, 2.0]
        >>> [float(time) for time in sampler.times(Fraction(8))]
        [1.0, 3.0, 5.0, 7.0]
    """

    def __init__(
        self,
        image_transform: ImageTransform,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
    ) -> None:
        if fps is None and num_frames is None:
            raise ConfigError("A video transform needs fps, num_frames or both.")
        if (fps is not None and not 0 < fps < math.inf) or (num_frames is not None and num_frames < 1):
            raise ConfigError(
                f"fps must be above 0 and num_frames at least 1, got {fps=}, {num_frames=}."
            )
        if isinstance(image_transform, TiledImageTransform | GridImageTransform):
            raise ConfigError(
                f"Frames are whole images: give an ImageTransform, not {type(image_transform).__name__}."
            )
        _import_av()
        self.image_transform, self.fps, self.num_frames = image_transform, fps, num_frames

    def times(self, duration: Fraction) -> list[Fraction]:
        """Return the times of the frames of a video of some seconds, from its start."""
        count = self.num_frames
        if self.fps is not None:
            by_rate = max(1, -int(-duration * Fraction(self.fps) // 1))
            if count is None or by_rate <= count:
                return [Fraction(k) / Fraction(self.fps) for k in range(by_rate)]
        assert count is not None
        return [duration * (2 * k + 1) / (2 * count) for k in range(count)]

    def num_items(self, media: Media) -> int:
        """Return the number of frames that a video becomes, without decoding it.

        Raises:
            DataError: as for a call.
        """
        with _opened(media) as (container, stream):
            return len(self.times(_read_index(container, stream).duration))

    def __call__(self, media: Media) -> MediaInput:
        """Turn a video into frames ``[f, 3, height, width]``.

        Raises:
            DataError: if the file is missing, no video, cut off or damaged.
        """
        frames = [self.image_transform(frame) for frame in read_frames(media, self.times)]
        return MediaInput(torch.stack(frames))


def read_frames(media: Media, times: Callable[[Fraction], Sequence[Fraction]]) -> Iterator[Image.Image]:
    """Iterate over the frames of a video at some times, upright, as RGB.

    Args:
        media: the video.
        times: returns ascending times in seconds from the start, for the duration in seconds.

    Raises:
        ConfigError: if PyAV is missing.
        DataError: if the file is missing, no video, cut off or damaged.
    """
    with _opened(media) as (container, stream):
        index = _read_index(container, stream)
    wanted = [index.frame_at(time) for time in times(index.duration)]
    with _opened(media) as (container, stream):
        yield from _decode(container, stream, index, wanted)


@dataclass(frozen=True)
class _Index:
    """The frames of a video, in ticks of its clock: when each is displayed, and where to seek to."""

    pts: list[int]
    key_frames: list[int]
    last_duration: int
    tick: Fraction

    @property
    def duration(self) -> Fraction:
        """Seconds from the start of the first frame to the end of the last."""
        return (self.pts[-1] + self.last_duration - self.pts[0]) * self.tick

    def frame_at(self, time: Fraction) -> int:
        """Return when the frame is displayed first that is displayed at a time."""
        ticks = self.pts[0] + (time + _ROUNDING) / self.tick
        return self.pts[max(0, bisect_right(self.pts, ticks) - 1)]

    def key_frame_before(self, pts: int) -> int:
        """Return the key frame from which a frame can be decoded."""
        return self.key_frames[max(0, bisect_right(self.key_frames, pts) - 1)]


def _read_index(container: Any, stream: Any) -> _Index:
    """Read when frames are displayed, from the packets, without decoding them."""
    num_packets, frames = 0, []
    for packet in container.demux(stream):
        num_packets += packet.size > 0
        if packet.size and not packet.is_discard:
            frames.append((packet.pts, packet.duration, packet.is_keyframe))
    if stream.frames > num_packets:
        raise ValueError(f"it is cut off, and has {num_packets} of {stream.frames} frames")
    if not frames or any(pts is None for pts, _, _ in frames):
        raise ValueError("its frames have no times" if frames else "it has no frames")
    frames.sort()
    pts = [pts for pts, _, _ in frames]
    gap = pts[-1] - pts[-2] if len(pts) > 1 else 1
    indexed = not _INDEXED.isdisjoint(container.format.name.split(","))
    key_frames = [pts for pts, _, is_key in frames if is_key and indexed]
    return _Index(pts, key_frames or pts[:1], frames[-1][1] or gap, stream.time_base)


def _decode(container: Any, stream: Any, index: _Index, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Decode frames, which are given by when they are displayed, in ascending order."""
    frames, frame = container.decode(stream), None
    for pts in wanted:
        key_frame = index.key_frame_before(pts)
        if key_frame > (index.pts[0] if frame is None else frame.pts):
            container.seek(key_frame, stream=stream)
            frames = container.decode(stream)
        while frame is None or frame.pts != pts:
            frame = next(frames, None)
            if frame is None:
                time = float((pts - index.pts[0]) * index.tick)
                raise ValueError(f"its frame at {time:.3f} s is damaged")
        yield _image(frame)


def _image(frame: Any) -> Image.Image:
    """Return a frame as it is displayed: turned, or mirrored, by its display matrix."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    signs = tuple((value > 0) - (value < 0) for value in (a, b, c, d))
    if signs in _TRANSPOSED:
        return image.transpose(_TRANSPOSED[signs])
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _matroska_size(media: Media) -> int:
    """Return the size that a Matroska file has by its head; 0 where it has none, as in a recording."""
    if media.path is not None and media.span is None:
        with media.path.open("rb") as file:
            head = file.read(_HEAD)
    else:
        head = media.read()[:_HEAD]
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment, which goes to the end of the file
    if not 4 <= at < len(head):
        return 0
    width = 9 - head[at].bit_length()
    unknown = (1 << 7 * width) - 1
    size = int.from_bytes(head[at : at + width]) & unknown
    return 0 if size == unknown else at + width + size


@contextmanager
def _opened(media: Media) -> Iterator[tuple[Any, Any]]:
    """Open a video with PyAV; errors in the body, as of decoding, become DataErrors that name it."""
    av = _import_av()
    try:
        on_disk = media.path is not None and media.span is None
        with av.open(str(media.path) if on_disk else io.BytesIO(media.read())) as container:
            if "matroska" in container.format.name and _matroska_size(media) > container.size:
                raise ValueError("it is cut off")
            if not container.streams.video:
                raise ValueError("it has no pictures")
            yield container, container.streams.video[0]
    except FusionError:
        raise
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"The {media.modality} {media} cannot be decoded: {reason}.") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError("Video files need PyAV: pip install 'torchfuse[video]'.") from error
    return av
