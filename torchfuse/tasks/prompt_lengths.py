"""Tokens of prompts and answers, before a model runs on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torchfuse.data.samples import Message, Sample
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError, DataError, name_problems
from torchfuse.tasks.prompts import Prompt, message_text

__all__ = [
    "encode_turn",
    "longest_answer",
    "most_features",
    "num_items",
    "prompt_lengths",
    "turn_lengths",
]


def encode_turn(
    transform: SampleTransform, messages: Sequence[Message], *, first: bool, ended: bool = True
) -> list[int]:
    """Return the ids of a turn, up to where its answer begins.

    Args:
        transform: turns messages into ids.
        messages: the whole conversation, with the question at its end.
        first: whether all of it is the turn. False: what follows the last answer.
        ended: whether that answer ended with a stop token.

    Raises:
        DataError: if the turn has no tokens, is too long for the transform, or has images in a later
            turn where all must come first.
    """
    question = f"{message_text(messages[-1])!r:.80}"
    if not first and messages[-1].media and transform.layout == "prefix":
        raise DataError(
            'with layout "prefix" images come in front of the sequence, so only the first turn can '
            f"have any, got {len(messages[-1].media)} with {question}"
        )
    tokens = transform.prompt(messages) if first else transform.next_turn(messages, ended=ended)
    if transform.max_seq_len is not None and len(tokens) > transform.max_seq_len:
        raise DataError(
            f"The question {question} is {len(tokens)} tokens long, and max_seq_len is "
            f"{transform.max_seq_len}."
        )
    if not tokens:
        raise DataError(f"the tokenizer makes no token of {question}")
    return tokens


def turn_lengths(
    transform: SampleTransform, prompts: Sequence[Prompt], *, path: str | Path
) -> list[list[int]]:
    """Return the most tokens of every turn of every prompt.

    Args:
        transform: turns messages into ids.
        prompts: the prompts.
        path: the file that they come from, for the message.

    Raises:
        DataError: naming every turn that cannot be encoded.
    """
    all_lengths, problems = [], []
    for number, prompt in enumerate(prompts, 1):
        messages = [] if prompt.system is None else [Message("system", [prompt.system])]
        lengths = []
        for index, turn in enumerate(prompt.turns):
            messages.append(turn)
            try:
                tokens = _next_turn(transform, messages, first=not index)
            except DataError as error:
                where = f", turn {index + 1}" if len(prompt.turns) > 1 else ""
                problems.append(f"prompt {number}{where}: {str(error).rstrip('.')}.")
            else:
                # The token that ends the answer before, if that was cut short, is this turn's.
                lengths.append(len(tokens) + (index > 0))
            messages.append(Message("assistant", ["a"]))
        all_lengths.append(lengths)
    if problems:
        raise DataError(name_problems(path, problems))
    return all_lengths


def _next_turn(transform: SampleTransform, messages: Sequence[Message], *, first: bool) -> list[int]:
    """Return the ids that a conversation runs for a turn, see ``Conversation``."""
    try:
        return encode_turn(transform, messages, first=first)
    except ConfigError:
        if first:
            raise
    return encode_turn(transform, messages, first=True)


def prompt_lengths(transform: SampleTransform, samples: Sequence[Sample]) -> list[int]:
    """Return the number of tokens of the prompt of every sample.

    Raises:
        DataError: naming every sample whose prompt cannot be encoded.
    """
    lengths, problems = [], []
    for number, sample in enumerate(samples, 1):
        try:
            lengths.append(len(encode_turn(transform, sample.prompt, first=True)))
        except DataError as error:
            problems.append(f"{sample.origin or f'prompt {number}'}: {str(error).rstrip('.')}.")
    if problems:
        raise DataError(problems[0] if len(problems) == 1 else name_problems("samples", problems))
    return lengths


def longest_answer(
    transform: SampleTransform, samples: Sequence[Sample], path: str | Path = "samples"
) -> int:
    """Check that every sample has an answer and is not too long with it.

    Args:
        transform: turns samples into ids.
        samples: the samples.
        path: their file, for the message.

    Returns:
        Tokens of the longest answer, with the end of its turn.

    Raises:
        DataError: naming every sample that has no answer or is too long.
    """
    longest, problems = 1, []
    for sample in samples:
        try:
            whole = transform.length(sample)
            longest = max(longest, whole - transform.length(sample, with_answer=False))
        except DataError as error:
            problems.append(str(error).removeprefix(f"{path}, "))
    if problems:
        raise DataError(name_problems(path, problems))
    return longest


def num_items(transform: SampleTransform, messages: Iterable[Message]) -> int:
    """Return the number of images in messages, where tiles and frames count one by one."""
    return sum(transform.reader.num_items(media) for message in messages for media in message.media)


def most_features(
    transform: SampleTransform, conversations: Iterable[Sequence[Message]]
) -> dict[str, int]:
    """Return the most features that a conversation has of each encoder."""
    numbers = [transform.formats.num_features(transform.items(messages)) for messages in conversations]
    return {name: max(number[name] for number in numbers) for name in numbers[0]} if numbers else {}
