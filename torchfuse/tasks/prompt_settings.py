"""How messages become prompts and how their answers are generated, in every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError, name_problems
from torchfuse.generation.caches import room_for_text
from torchfuse.generation.checks import input_id_problems, special_tokens, stop_token_problems
from torchfuse.generation.sampling import Sampling
from torchfuse.generation.steps import bucket
from torchfuse.models.strategy import features_per_image
from torchfuse.naming import find_model, unwrap

__all__ = ["PromptSettings", "required_slots", "transform_problems"]


@dataclass(frozen=True)
class PromptSettings:
    """How messages become prompts and how their answers are generated.

    Attributes:
        transform: turns messages into tokens and images into pixels, as in training; its template is
            that of the prompts.
        sampling: how tokens are chosen; greedily unless given.
        max_new_tokens: the longest answer, its stop token included.
        stop_tokens: ids that end an answer; the transform's unless given.
        seed: prompt ``i`` is sampled with a generator of its own, seeded with ``seed + i``, so that its
            answer is the same in any batch.
        compile: whether prompts and steps run as compiled graphs.
    """

    transform: SampleTransform
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    max_new_tokens: int = 32
    stop_tokens: Sequence[int] | None = None
    seed: int = 0
    compile: bool = False

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.transform.stop_tokens if self.stop_tokens is None else tuple(self.stop_tokens)

    def problems(self, model: nn.Module) -> list[str]:
        """Return what is out of range or does not fit the model."""
        problems = self.sampling.problems()
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        problems += stop_token_problems(find_model(model), self.stops)
        return problems + transform_problems(model, self.transform)

    def check(self, model: nn.Module) -> None:
        """Raise a ``ConfigError`` naming everything that is out of range or does not fit the model."""
        if problems := self.problems(model):
            raise ConfigError(f"The prompt settings do not fit the model: {'; '.join(problems)}.")

    def until_stop(self, tokens: Sequence[int]) -> list[int]:
        """Return an answer's tokens up to its first stop token, that one included."""
        ends = [index for index, token in enumerate(tokens) if token in self.stops]
        return list(tokens[: ends[0] + 1] if ends else tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer, without its stop token."""
        return self.transform.decode([token for token in tokens if token not in self.stops])

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """Return the source of randomness of the prompt of this index; None at a temperature of 0."""
        if self.sampling.temperature == 0:
            return None
        return torch.Generator(device).manual_seed(self.seed + index)


def transform_problems(model: nn.Module, transform: SampleTransform) -> list[str]:
    """Return in what a transform does not fit a model: its ids, and the features of an image."""
    owner: Any = unwrap(find_model(model))
    tokenizer = transform.tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = {"bos_token_id": bos, "eos_token_id": tokenizer.eos_ids}
    problems = input_id_problems(owner, ids | {"pad_token_id": [tokenizer.pad_id]})
    strategy = getattr(owner, "strategy", None)
    if strategy is None:
        return problems
    given, rows = transform.image_token, owner.tok_embeddings.num_embeddings
    special, prefix = special_tokens(owner), strategy.extra_tokens(1) > 0
    for token in given.values() if isinstance(given, Mapping) else [given]:
        if (token is None) != prefix:
            expected = "null (layout prefix)" if prefix else "an id that marks images"
            problems.append(f"image_token must be {expected} for this model, got {token}")
        elif token is not None and special and token not in special:
            problems.append(f"image_token is {token}, but in this model features replace {special}")
        elif token is not None and not special and not 0 <= token < rows:
            problems.append(
                f"image_token is {token}, but the model embeds the ids below {rows}; "
                "fusion_vocab_size=1 adds a row for it"
            )
    for name in owner.encoder_names:
        try:
            number = features_per_image(owner, name, one_tile=True)
        except ConfigError:  # unknown until the encoder runs
            continue
        features = transform.features_per_image
        features = features.get(name, 0) if isinstance(features, Mapping) else features
        if number != features:
            problems.append(f"features_per_image is {features}, but {name!r} makes {number} of an image")
    return problems


def required_slots(
    model: nn.Module,
    settings: PromptSettings,
    lengths: Sequence[Sequence[int]],
    max_features: int,
    *,
    path: str | Path,
) -> int:
    """Return the tokens of text that the longest prompt takes, with its turns and their longest answers.

    Args:
        model: a fused model, or a plain decoder.
        settings: how messages become prompts.
        lengths: the number of tokens of each turn of each prompt.
        max_features: the most features of the images of one prompt.
        path: the file of the prompts, for the message.

    Raises:
        ConfigError: naming each prompt that does not fit the model.
    """
    model = find_model(model)
    slots, problems, new = [0], [], settings.max_new_tokens
    room = room_for_text(model, max_features)
    for number, turns in enumerate(lengths, 1):
        used = 0
        for turn in turns:
            # The last token of an answer is run with the next turn.
            length = turn + (used > 0)
            if settings.compile:
                length = bucket(length, room - used - new)
            used += length + new - 1
        slots.append(used + 1)
        if used + 1 > room:
            padded = "padded to lengths that share a graph, " if settings.compile else ""
            problems.append(
                f"prompt {number}: {sum(turns)} tokens in {len(turns)} turns, {padded}and an "
                f"answer of up to {new} to each are {used + 1}, and {room} fit into the model's "
                f"max_seq_len of {model.max_seq_len} beside {max_features} features of images."
            )
    if problems:
        raise ConfigError(name_problems(path, problems))
    return max(slots)
