"""What every way of asking shares: how an answer is chosen, where it ends, what an image becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.data.questions import QuestionTransform, name_problems
from torchfuse.errors import ConfigError
from torchfuse.generation.checks import vocab_size
from torchfuse.generation.sampling import Sampling
from torchfuse.generation.steps import bucket
from torchfuse.naming import unwrap
from torchfuse.tasks.prompts import Template
from torchfuse.tasks.report import Report

__all__ = ["PromptSettings", "encode_images", "feature_problems", "room_for_text", "slots_for"]


@dataclass(frozen=True)
class PromptSettings:
    """How questions are put and answers made.

    Attributes:
        transform: turns questions into tokens and images into pixels, as in training.
        template: what stands around a question.
        sampling: how tokens are chosen; the likeliest always unless given.
        max_new_tokens: longest answer, its end included.
        stop_tokens: ids that end an answer; the tokenizer's unless given.
        seed: prompt ``i`` draws from a generator of its own, seeded with ``seed + i``, so that its
            answer is the same in any batch.
        compile: whether prompts and steps run as compiled graphs.
    """

    transform: QuestionTransform
    template: Template = field(default_factory=Template)
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    max_new_tokens: int = 32
    stop_tokens: Sequence[int] | None = None
    seed: int = 0
    compile: bool = False

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.transform.stop_tokens if self.stop_tokens is None else tuple(self.stop_tokens)

    def problems(self, model: nn.Module | None = None) -> list[str]:
        """What is out of range, in words; with the model, what does not fit it either."""
        problems = self.sampling.problems() + self.template.problems()
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if negative := [stop for stop in self.stops if stop < 0]:
            problems.append(f"stop_tokens {negative} are no ids")
        if model is not None:
            vocab = vocab_size(model)
            if beyond := [stop for stop in self.stops if stop >= vocab]:
                problems.append(f"stop_tokens {beyond} must lie in [0, {vocab}), what the head scores")
            problems += feature_problems(model, self.transform)
        return problems

    def until_stop(self, tokens: Sequence[int]) -> list[int]:
        """An answer up to the first token that ends it, with that token."""
        ends = [index for index, token in enumerate(tokens) if token in self.stops]
        return list(tokens[: ends[0] + 1] if ends else tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without its end."""
        return self.transform.decode([token for token in tokens if token not in self.stops])

    def generator(self, index: int, device: torch.device) -> torch.Generator | None:
        """Where the prompt of this index draws from; nothing is drawn at a temperature of 0."""
        if self.sampling.temperature == 0:
            return None
        return torch.Generator(device).manual_seed(self.seed + index)


def feature_problems(model: nn.Module, transform: QuestionTransform) -> list[str]:
    """How what a transform makes of images differs from what the model does with them, in words."""
    owner: Any = unwrap(model)
    strategy = getattr(owner, "strategy", None)
    if strategy is None:
        return []
    problems = []
    token, rows = transform.image_token, owner.tok_embeddings.num_embeddings
    special, in_front = strategy.special_tokens(), strategy.extra_tokens(1) > 0
    if (token is None) != in_front:
        wanted, got = ("null (layout prefix)", token) if in_front else ("an id that marks images", None)
        problems.append(f"image_token must be {wanted} for this model, got {token if in_front else got}")
    elif token is not None and special and token not in special:
        problems.append(f"image_token is {token}, but in this model features replace {special}")
    elif token is not None and token >= rows and not special:
        problems.append(f"image_token is {token}, but the model embeds ids below {rows}")
    for name in owner.encoder_names:
        number = _features_per_image(owner, name)
        if number is not None and number != transform.features_per_image:
            problems.append(
                f"features_per_image is {transform.features_per_image}, but {name!r} makes {number} of "
                "an image"
            )
    return problems


def _features_per_image(model: Any, name: str) -> int | None:
    """Features of one image as they reach the decoder, where encoder and adapter say so."""
    encoder, adapter = unwrap(model.get_encoder(name)), model.get_adapter(name)
    number = getattr(encoder, "tokens_per_tile", getattr(encoder, "num_tokens", None))
    if number is None or adapter is None:
        return number
    through: Any = getattr(adapter, "output_num_tokens", None)
    return None if through is None else int(through(number))


def encode_images(model: Any, images: Tensor, report: Report, number: int) -> Tensor:
    """Features of images ``[b, m, c, s, s]``, image by image, ``[b, m * features_per_image, d]``.

    A tower that cuts images into tiles gets each as one tile, and the features of the tiles that it pads
    an image with are left out: nothing may attend to them.

    Args:
        model: a fused model.
        images: normalised pixels.
        report: what notes the time.
        number: how many of them are no padding, for the report.
    """
    owner: Any = unwrap(model)
    device = images.device
    encoder = unwrap(owner.get_encoder(owner.encoder_names[0]))
    per_tile = getattr(encoder, "tokens_per_tile", None)
    given = images if per_tile is None else images.unsqueeze(2)
    features = report.time_images(number, device, lambda: model.encode({"images": given}))
    if per_tile is None:
        return features
    return features.unflatten(1, (images.shape[1], -1))[:, :, :per_tile].flatten(1, 2)


def room_for_text(model: Any, num_features: int) -> int:
    """Tokens of text that fit into a model's ``max_seq_len`` beside this many features."""
    strategy = getattr(unwrap(model), "strategy", None)
    return int(model.max_seq_len) - (0 if strategy is None else strategy.extra_tokens(num_features))


def slots_for(
    model: nn.Module,
    asking: PromptSettings,
    encoded: Sequence[Sequence[Sequence[int]]],
    max_images: int,
    *,
    path: str | Path,
) -> int:
    """Slots of text that the longest prompt takes, all its turns and the longest answers to them.

    Args:
        model: a fused model.
        asking: how questions are put and answers made.
        encoded: ids of each turn of each prompt.
        max_images: the most images that one of them has.
        path: the file that the prompts come from, for the message.

    Raises:
        ConfigError: naming each prompt that does not fit the model.
    """
    slots, problems, new = [0], [], asking.max_new_tokens
    room = room_for_text(model, max_images * asking.transform.features_per_image)
    for number, turns in enumerate(encoded, 1):
        used = 0
        for turn in turns:
            # An answer's last token is read with the turn behind it.
            length = len(turn) + (used > 0)
            if asking.compile:
                length = bucket(length, room - used - new)
            used += length + new - 1
        slots.append(used + 1)
        if used + 1 > room:
            padded = "padded to lengths that share a graph, " if asking.compile else ""
            problems.append(
                f"prompt {number}: {sum(map(len, turns))} tokens in {len(turns)} turns, {padded}and an "
                f"answer of up to {new} to each are {used + 1}, and {room} fit into the model's "
                f"max_seq_len of {model.max_seq_len} beside {max_images} images."
            )
    if problems:
        raise ConfigError(name_problems(path, problems))
    return max(slots)
