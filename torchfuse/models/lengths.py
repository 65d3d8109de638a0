"""Whether text and features fit the decoder's sequence, computed before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchfuse.errors import ConfigError
from torchfuse.models.types import UNNAMED
from torchfuse.modules.adapters.base import Adapter

__all__ = ["check_lengths", "tokens_of_frame"]


def check_lengths(
    *,
    max_seq_len: int,
    text_len: int,
    num_tokens: int | Mapping[str, int | None] | None,
    num_frames: int | Mapping[str, int] = 1,
    adapter: Adapter | Mapping[str, Adapter | None] | None = None,
    in_sequence: bool = True,
) -> int | None:
    """Compare the longest sequence with the decoder's ``max_seq_len``.

    Args:
        max_seq_len: positions of the decoder.
        text_len: tokens of the longest text, without placeholders of features.
        num_tokens: features of one image before the adapter; None where it depends on the input. By name
            for named encoders, as for the next two.
        num_frames: the most images of a row, or frames of a clip.
        adapter: maps features to the decoder's width and may change their number. None: it does not.
        in_sequence: whether features take positions of the decoder; False for ``"cross_attention"``.

    Returns:
        The length of the longest sequence; None if an encoder's number of features is not known.

    Raises:
        ConfigError: with every number, if the decoder is too short; if a number is out of range, or an
            adapter cannot take such features or would take a clip as one large image.

    Examples:
        >>> check_lengths(max_seq_len=64, text_len=20, num_tokens=9, num_frames=4)
        56
        >>> check_lengths(max_seq_len=64, text_len=20, num_tokens=25, num_frames=4)
        Traceback (most recent call last):
        torchfuse.errors.ConfigError: max_seq_len 64 is shorter than 4 frames x 25 tokens + 20 ...
    """
    tokens = dict(num_tokens) if isinstance(num_tokens, Mapping) else {UNNAMED: num_tokens}
    frames = _by_name(num_frames, tokens, "num_frames")
    adapters = _by_name(adapter, tokens, "adapter")
    least = {"max_seq_len": (max_seq_len, 1), "text_len": (text_len, 0)}
    least |= {f"num_tokens{_of(name)}": (n, 1) for name, n in tokens.items() if n is not None}
    least |= {f"num_frames{_of(name)}": (n, 1) for name, n in frames.items()}
    problems = [f"{what}={n} must be at least {low}" for what, (n, low) in least.items() if n < low]
    if problems:
        raise ConfigError(f"Lengths: {'; '.join(problems)}.")
    total, parts = text_len, []
    for name, num in tokens.items():
        if num is None:
            parts.append(f"the features{_of(name)}, however many,")
            continue
        each = tokens_of_frame(adapters[name], num, frames[name], name)
        total += frames[name] * each
        before = f" ({num} before the adapter)" if each != num else ""
        parts.append(f"{_frames(frames[name])} x {each} tokens{_of(name)}{before}")
    if not in_sequence:
        total, parts = text_len, []
    unknown = in_sequence and None in tokens.values()
    if total > max_seq_len:
        needed = " + ".join([*parts, f"{text_len} text tokens"]) + f" = {total}"
        pooled = ", shorten the text, or use fewer frames or an adapter that pools"
        raise ConfigError(
            f"max_seq_len {max_seq_len} is shorter than {needed}{' and more' if unknown else ''}. Raise "
            f"max_seq_len{pooled if parts else ' or shorten the text'}."
        )
    return None if unknown else total


def tokens_of_frame(adapter: Adapter | None, num: int, frames: int, name: str = UNNAMED) -> int:
    """Return the tokens of one frame after the adapter.

    Args:
        adapter: None: there is none.
        num: features of one frame before it.
        frames: frames of a clip.
        name: the encoder's, for messages.

    Raises:
        ConfigError: if the adapter cannot take such features, or would take the clip as one large image.
    """
    if adapter is None:
        return num
    try:
        each, all_frames = adapter.output_num_tokens(num), adapter.output_num_tokens(frames * num)
    except ValueError as error:
        raise ConfigError(
            f"{_frames(frames)} x {num} tokens{_of(name)} do not fit the adapter. {error}"
        ) from error
    if all_frames != frames * each:
        raise ConfigError(
            f"The adapter{_of(name)} makes {each} tokens of a frame's {num}, but {all_frames} of the "
            f"{frames * num} of {frames} frames, not {frames * each}: it takes the clip as one image. "
            "Give it the side of a frame's grid (grid=)."
        )
    return each


def _by_name(given: Any, tokens: Mapping[str, int | None], what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(tokens, given)
    if given.keys() != tokens.keys():
        raise ConfigError(
            f"{what} must have the names of the encoders, {', '.join(tokens)}; got {', '.join(given)}."
        )
    return dict(given)


def _of(name: str) -> str:
    return "" if name == UNNAMED else f" of {name!r}"


def _frames(number: int) -> str:
    return "1 frame" if number == 1 else f"{number} frames"
