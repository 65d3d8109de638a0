"""Whether text and features fit the decoder's sequence, before anything is built or runs.

Numbers only, so that a configuration and a builder ask the same question: the first with what a file
says, the second with what the built encoder and adapter say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torchfuse.errors import ModelError

__all__ = ["CountsTokens", "check_lengths"]

_Value = TypeVar("_Value")
_ONE = ""  # the name of an encoder without a name


class CountsTokens(Protocol):
    """What says how many tokens come out where so many go in, as an ``Adapter`` does."""

    def output_num_tokens(self, num_tokens: int) -> int:
        """The number of tokens that come out."""


def check_lengths(
    *,
    max_seq_len: int,
    text_len: int,
    num_tokens: int | Mapping[str, int | None] | None,
    num_frames: int | Mapping[str, int] = 1,
    adapter: CountsTokens | Mapping[str, CountsTokens | None] | None = None,
    in_sequence: bool = True,
) -> int | None:
    """Compare the longest sequence with what the decoder can hold.

    Args:
        max_seq_len: positions of the decoder.
        text_len: the longest text, without placeholders of features.
        num_tokens: features of one image, as the encoder says; None where it depends on the input. By
            name for named encoders.
        num_frames: images a row at most, or frames of a clip; by name for encoders that differ.
        adapter: what changes the number of features; None where it does not. By name likewise.
        in_sequence: whether features take positions of the decoder. In ``"cross_attention"`` they take
            none.

    Returns:
        The length of the longest sequence; None if an encoder's number of features is not known.

    Raises:
        ModelError: if the decoder is too short, with every number; if a number is out of range; if an
            adapter cannot take such features, or would take a clip for one large image.

    Examples:
        >>> check_lengths(max_seq_len=64, text_len=20, num_tokens=9, num_frames=4)
        56
        >>> check_lengths(max_seq_len=64, text_len=20, num_tokens=25, num_frames=4)
        Traceback (most recent call last):
        torchfuse.errors.ModelError: max_seq_len 64 is shorter than 4 frames x 25 tokens + 20 ...
    """
    tokens = dict(num_tokens) if isinstance(num_tokens, Mapping) else {_ONE: num_tokens}
    frames = _by_name(num_frames, tokens, "num_frames")
    adapters = _by_name(adapter, tokens, "adapter")
    problems = [
        f"{what}={number} must be at least {least}"
        for what, number, least in [
            ("max_seq_len", max_seq_len, 1),
            ("text_len", text_len, 0),
            *((f"num_tokens{_of(name)}", n, 1) for name, n in tokens.items() if n is not None),
            *((f"num_frames{_of(name)}", n, 1) for name, n in frames.items()),
        ]
        if number < least
    ]
    if problems:
        raise ModelError(f"Lengths: {'; '.join(problems)}.")
    total, parts, unknown = text_len, [], False
    for name, num in tokens.items():
        if num is None:
            unknown = True
            parts.append(f"the features{_of(name)}, however many,")
            continue
        each = _behind(adapters[name], num, frames[name], name)
        total += frames[name] * each
        before = f" ({num} before the adapter)" if each != num else ""
        parts.append(f"{frames[name]} {_noun(frames[name])} x {each} tokens{_of(name)}{before}")
    if not in_sequence:
        total, parts, unknown = text_len, [], False
    if total > max_seq_len:
        remedy = ", shorten the text, or use fewer frames or an adapter that pools"
        needed = " + ".join([*parts, f"{text_len} text tokens"])
        raise ModelError(
            f"max_seq_len {max_seq_len} is shorter than {needed} = {total}"
            f"{' and more' if unknown else ''}. Raise max_seq_len"
            f"{remedy if parts else ' or shorten the text'}."
        )
    return None if unknown else total


def _behind(adapter: CountsTokens | None, num: int, frames: int, name: str) -> int:
    """Tokens of one frame behind the adapter, which must count the frames of a clip as frames."""
    if adapter is None:
        return num
    try:
        each, all_frames = adapter.output_num_tokens(num), adapter.output_num_tokens(frames * num)
    except ValueError as error:
        raise ModelError(
            f"{frames} {_noun(frames)} x {num} tokens{_of(name)} do not suit the adapter. {error}"
        ) from error
    if all_frames != frames * each:
        raise ModelError(
            f"The adapter{_of(name)} makes {each} tokens of a frame's {num}, but {all_frames} of the "
            f"{frames * num} of {frames} frames, not {frames * each}: it takes the clip for one image. "
            "Give it the side of a frame's grid (grid=)."
        )
    return each


def _by_name(given: Any, tokens: Mapping[str, int | None], what: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(tokens, given)
    if given.keys() != tokens.keys():
        names = ", ".join(tokens) if _ONE not in tokens else "none, for one encoder without a name"
        raise ModelError(f"{what} must have the names of the encoders, {names}; got {', '.join(given)}.")
    return dict(given)


def _of(name: str) -> str:
    return f" of {name!r}" if name else ""


def _noun(frames: int) -> str:
    return "frame" if frames == 1 else "frames"
