"""Turns of a conversation as a record has them, and the messages that they become.

A turn has places for media: tags in its text (``<image>``) or parts without content of their own. The
media beside the conversation fill the places in their order. A record whose numbers of places and media
differ is refused, with two leniencies: a single medium without a place comes first, and where a format
says so a single image is moved to the front of the first turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from torchfuse.data.readers.media_fields import MODALITIES
from torchfuse.data.samples import Content, Media, Message, Role

__all__ = ["Layout", "Piece", "Place", "Turn", "build_messages", "split_tags"]

_TAG: Final = re.compile(f"<({'|'.join(MODALITIES)})>")


@dataclass(frozen=True)
class Place:
    """The place of a medium in a turn.

    Attributes:
        modality: of the medium.
        index: of the medium beside the conversation; None: the next one.
    """

    modality: str
    index: int | None = field(default=None, compare=False)


Piece = str | Media | Place


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation, before its places are filled.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``; None where it is unknown, which is a problem.
        pieces: text, places, and media with content of their own; None where they cannot be read.
        weight: factor of the loss, see ``Message``.
    """

    role: Role | None
    pieces: list[Piece] | None
    weight: float = 1.0


@dataclass(frozen=True)
class Layout:
    """How a format places media that have no place in the text.

    Attributes:
        unplaced: how many media of one modality may lack places: ``"one"`` or ``"all"``.
        separator: text behind each of them.
        single_first: whether a single image in the first user's turn is moved to the turn's front, as
            LLaVA does in training.
        image_tags_of_videos: whether ``<image>`` is the tag of videos in a record without images, as in
            LLaVA's data of videos.
    """

    unplaced: Literal["one", "all"] = "one"
    separator: str = ""
    single_first: bool = False
    image_tags_of_videos: bool = False


def split_tags(text: str) -> list[Piece]:
    """Split a text at the tags of media.

    Examples:
        >>> split_tags("<image> which ?")
        [Place(modality='image', index=None), ' which ?']
    """
    pieces = [Place(part) if index % 2 else part for index, part in enumerate(_TAG.split(text))]
    return [piece for piece in pieces if piece != ""]


def build_messages(
    turns: Sequence[Turn], media: Mapping[str, Sequence[Media]], layout: Layout, problems: list[str]
) -> list[Message]:
    """Return the messages of a conversation, with the places for media filled.

    Args:
        turns: the turns.
        media: the media beside the conversation, by modality.
        layout: where media without a place belong.
        problems: problems of the record; added to. If there are any, no message is returned.
    """
    problems += _order_problems([turn.role for turn in turns])
    turns = list(turns)
    if layout.image_tags_of_videos and media.get("video") and not media.get("image"):
        turns = [_with_videos(turn) for turn in turns]
    if all(turn.pieces is not None for turn in turns):
        for modality, items in media.items():
            problems += _place(turns, Place(modality), len(items), layout)
    if problems:
        return []
    queues = {modality: iter(items) for modality, items in media.items()}
    messages = []
    for turn in turns:
        assert turn.role is not None
        assert turn.pieces is not None
        content: Content = [
            piece
            if not isinstance(piece, Place)
            else next(queues[piece.modality])
            if piece.index is None
            else media[piece.modality][piece.index]
            for piece in turn.pieces
        ]
        messages.append(Message(turn.role, content, turn.weight))
    return messages


def _order_problems(roles: Sequence[Role | None]) -> list[str]:
    if not roles:
        return ["the conversation is empty"]
    problems = []
    for number, role in enumerate(roles):
        if role == "system" and number:
            problems.append(f"message {number + 1} is of the system, which can only be the first")
        if role == "assistant" and (not number or roles[number - 1] not in ("user", None)):
            problems.append(f"message {number + 1} is an answer without question")
    if set(roles) == {"system"}:
        problems.append("the conversation has no message of the user")
    return problems


def _with_videos(turn: Turn) -> Turn:
    """Return a turn whose places of images are places of videos."""
    image, video = Place("image"), Place("video")
    pieces = [video if piece == image else piece for piece in turn.pieces or []]
    return turn if turn.pieces is None else replace(turn, pieces=pieces)


def _place(turns: list[Turn], place: Place, num_media: int, layout: Layout) -> list[str]:
    """Give each medium of one modality a place, if the format leaves that open; return what is wrong."""
    name = place.modality
    indices = [
        piece.index
        for turn in turns
        for piece in turn.pieces or []
        if isinstance(piece, Place) and piece == place
    ]
    num_places = len(indices)
    if num_places != num_media and (num_places or (num_media > 1 and layout.unplaced == "one")):
        return [f"the conversation has <{name}> {num_places} times, but there are {num_media} {name}s"]
    if any(index is not None for index in indices) and {*indices} != {*range(num_media)}:
        return [f"the parts of {num_media} {name}s must have each index from 0 once, got {indices}"]
    first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return []
    pieces = turns[first].pieces or []
    separator: list[Piece] = [layout.separator] if layout.separator else []
    if num_media and not num_places:
        turns[first] = replace(turns[first], pieces=_join([place, *separator] * num_media + pieces))
    elif layout.single_first and num_places == 1 and place in pieces[1:]:
        text = _join([piece for piece in pieces if piece != place])[0]
        if isinstance(text, str):
            turns[first] = replace(turns[first], pieces=_join([place, *separator, text.strip()]))
    return []


def _join(pieces: Sequence[Piece]) -> list[Piece]:
    """Join texts that follow each other."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined
