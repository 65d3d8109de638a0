"""Conversations as token ids, with labels and the tokens of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor

from torchfuse.data.documents import ImageLayout
from torchfuse.data.masks import ImageScope, image_mask
from torchfuse.data.samples import Message
from torchfuse.data.templates import ChatTemplate
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import ConfigError, DataError

__all__ = ["IGNORED", "SequenceEncoder"]

IGNORED: Final = -100


class SequenceEncoder:
    """Turn conversations into ids, given the number of items (tiles, frames) of each image.

    Args:
        tokenizer: directory of the language model.
        template: how a conversation is written.
        image_token: id of an image; None for the layout ``"prefix"``.
        layout: the tokens of an image.
        features_per_item: features of each item of an image.
        scope: which images a token may attend to, see ``image_mask``; with ``"marker"``.

    Raises:
        ConfigError: if the layout is unknown, or ``image_token`` does not fit it or the tokenizer.
        CheckpointError: if the directory lacks a file.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        template: ChatTemplate,
        *,
        image_token: int | None,
        layout: ImageLayout,
        features_per_item: int,
        scope: ImageScope,
    ) -> None:
        if layout not in get_args(ImageLayout):
            raise ConfigError(f'layout must be "marker", "placeholder" or "prefix", got {layout!r}.')
        if (image_token is None) != (layout == "prefix"):
            raise ConfigError(
                f"image_token={image_token} does not fit layout={layout!r}: give None for the layout "
                '"prefix", and an id for the others.'
            )
        self.template = template
        self.tokenizer = TextTokenizer(
            tokenizer,
            image_token=image_token,
            image_text=template.image_text,
            template=template.source,
        )
        self.layout, self.features_per_item, self.scope = layout, features_per_item, scope
        self.stop_tokens = self._find_stop_tokens()

    def encode(self, messages: Sequence[Message], num_items: Sequence[int]) -> dict[str, Any]:
        """Return ``tokens``, ``labels`` and, if there are weights other than 0 and 1, ``loss_weights``.

        Raises:
            DataError: if the template refuses the conversation.
        """
        rendered = self.template.render(messages, self.tokenizer)
        ids, parts = self.tokenizer.encode_template(rendered.text, rendered.learned)
        in_front = self._bos(ids)
        given = [messages[rendered.messages[part]].weight if part >= 0 else 0.0 for part in parts]
        tokens, weights = self.expand(in_front + ids, num_items, [0.0] * len(in_front) + given)
        labels = [token if weight else IGNORED for token, weight in zip(tokens, weights, strict=True)]
        result: dict[str, Any] = {"tokens": tokens, "labels": labels}
        return result if {0, 1}.issuperset(weights) else {**result, "loss_weights": weights}

    def prompt(self, messages: Sequence[Message], num_items: Sequence[int]) -> list[int]:
        """Return the ids of a conversation up to where the next answer begins.

        Raises:
            DataError: if the template refuses the conversation.
        """
        ids, _ = self.tokenizer.encode_template(self.template.prompt(messages, self.tokenizer))
        return self.expand(self._bos(ids) + ids, num_items)[0]

    def next_turn(
        self, messages: Sequence[Message], num_items: Sequence[int], *, ended: bool = True
    ) -> list[int]:
        """Return the ids of ``prompt`` after those of the last answer in the conversation.

        Args:
            messages: the whole conversation, with a new question at its end.
            num_items: of the images after the last answer.
            ended: whether the last answer ended with a stop token. Otherwise it was cut short, and the
                ids begin with the end of its turn.

        Raises:
            DataError: if the template refuses the conversation.
            ConfigError: if the template writes earlier turns otherwise than before.
        """
        text, start = self.template.next_turn(messages, self.tokenizer)
        ids, parts = self.tokenizer.encode_template(text, [(start, len(text))])
        first = parts.index(0) if 0 in parts else len(ids)
        if not ended and first and ids[first - 1] in self.stop_tokens:
            first -= 1
        return self.expand(ids[first:], num_items)[0]

    def expand(
        self, ids: Sequence[int], num_items: Sequence[int], weights: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Put all tokens of each image in place of one, with weight 0.

        Args:
            ids: a sequence with one token for each image.
            num_items: of its images.
            weights: of the tokens; all 0 unless given.
        """
        counts = iter(num_items)
        tokens: list[int] = []
        expanded: list[float] = []
        for token, weight in zip(ids, weights or [0.0] * len(ids), strict=True):
            repeats = 1
            if token == self.tokenizer.image_token:
                weight, items = 0.0, next(counts)
                repeats = items * self.features_per_item if self.layout == "placeholder" else 1
            tokens += [token] * repeats
            expanded += [weight] * repeats
        return tokens, expanded

    def length(self, tokens: Sequence[int], num_items: Sequence[int]) -> int:
        """Return the positions of the decoder that a sequence takes with its images."""
        in_front = sum(num_items) * self.features_per_item if self.layout == "prefix" else 0
        return len(tokens) + in_front

    def encoder_mask(self, tokens: Sequence[int], num_items: Sequence[int]) -> Tensor:
        """Return which features each token may attend to, bool ``[s, n]``, True: may attend."""
        features = torch.tensor(num_items, dtype=torch.long) * self.features_per_item
        image_token = self.tokenizer.image_token
        if image_token is None:
            return torch.ones(len(tokens), int(features.sum()), dtype=torch.bool)
        ids = torch.tensor([list(tokens)])
        if self.layout == "placeholder":
            before = features.cumsum(0) - features
            shown = (ids[0] == image_token).cumsum(0)[:, None] > before
        else:
            options: Any = {"features_per_image": 1, "num_images": len(num_items), "scope": self.scope}
            shown = image_mask(ids, image_token, **options)[0]
        return shown.repeat_interleave(features, dim=1)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the first stop token, without images."""
        ends = (index for index, token in enumerate(tokens) if token in self.stop_tokens)
        text = tokens[: next(ends, len(tokens))]
        return self.tokenizer.decode([token for token in text if token != self.tokenizer.image_token])

    def _bos(self, ids: list[int]) -> list[int]:
        """Return what is in front of the ids of a template."""
        bos = list(self.tokenizer.bos) if self.template.adds_bos else []
        return [] if ids[: len(bos)] == bos else bos

    def _find_stop_tokens(self) -> tuple[int, ...]:
        """Return the id that ends the turn of an answer, and those that end a text."""
        turns = [Message("user", ["a"]), Message("assistant", ["a"])]
        try:
            rendered = self.template.render(turns, self.tokenizer)
        except DataError:  # other conversations than this one may fit it
            return self.tokenizer.eos_ids
        text = rendered.text[: rendered.learned[-1][1]].rstrip()
        last = self.tokenizer.encode_template(text)[0][-1:]
        ends = last if self.tokenizer.ends_with_special(text) else []
        return tuple(dict.fromkeys([*ends, *self.tokenizer.eos_ids]))
