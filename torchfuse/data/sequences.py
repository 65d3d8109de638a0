"""Conversations as token ids, with labels and the tokens of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor

from torchfuse.data.documents import ImageLayout
from torchfuse.data.encoder_items import ItemFormats, Items
from torchfuse.data.masks import ImageScope, image_mask
from torchfuse.data.samples import Message
from torchfuse.data.templates import ChatTemplate
from torchfuse.data.tokenizer import TextTokenizer
from torchfuse.errors import ConfigError, DataError

__all__ = ["IGNORED", "SequenceEncoder"]

IGNORED: Final = -100


class SequenceEncoder:
    """Turn conversations into ids, given the items (tiles, frames) of each image or other medium.

    Args:
        tokenizer: directory of the language model.
        template: how a conversation is written.
        formats: what an item becomes, by encoder. The tokens are None for the layout ``"prefix"``.
        layout: the tokens of an image.
        scope: which images a token may attend to, see ``image_mask``; with ``"marker"``.

    Raises:
        ConfigError: if the layout is unknown, or tokens of images do not fit it or the tokenizer.
        CheckpointError: if the directory lacks a file.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        template: ChatTemplate,
        *,
        formats: ItemFormats,
        layout: ImageLayout,
        scope: ImageScope,
    ) -> None:
        if layout not in get_args(ImageLayout):
            raise ConfigError(f'layout must be "marker", "placeholder" or "prefix", got {layout!r}.')
        tokens = [each.token for each in formats.by_encoder.values()]
        for token in tokens:
            if (token is None) != (layout == "prefix"):
                raise ConfigError(
                    f"image_token={token} does not fit layout={layout!r}: give None for the layout "
                    '"prefix", and an id for the others.'
                )
        if layout == "marker" and len(set(tokens)) > 1:
            raise ConfigError(f'With layout "marker" encoders share one image_token, got {tokens}.')
        self.template = template
        self.tokenizer = TextTokenizer(
            tokenizer,
            image_token=tokens[0],
            image_text=template.image_text,
            template=template.source,
        )
        self.layout, self.formats, self.scope = layout, formats, scope
        self.stop_tokens = self._find_stop_tokens()

    def encode(self, messages: Sequence[Message], items: Sequence[Items]) -> dict[str, Any]:
        """Return ``tokens``, ``labels`` and, if there are weights other than 0 and 1, ``loss_weights``.

        Raises:
            DataError: if the template refuses the conversation.
        """
        rendered = self.template.render(messages, self.tokenizer)
        ids, parts = self.tokenizer.encode_template(rendered.text, rendered.learned)
        in_front = self._bos(ids)
        given = [messages[rendered.messages[part]].weight if part >= 0 else 0.0 for part in parts]
        tokens, weights = self.expand(in_front + ids, items, [0.0] * len(in_front) + given)
        labels = [token if weight else IGNORED for token, weight in zip(tokens, weights, strict=True)]
        result: dict[str, Any] = {"tokens": tokens, "labels": labels}
        return result if {0, 1}.issuperset(weights) else {**result, "loss_weights": weights}

    def prompt(self, messages: Sequence[Message], items: Sequence[Items]) -> list[int]:
        """Return the ids of a conversation up to where the next answer begins.

        Raises:
            DataError: if the template refuses the conversation.
        """
        ids, _ = self.tokenizer.encode_template(self.template.prompt(messages, self.tokenizer))
        return self.expand(self._bos(ids) + ids, items)[0]

    def next_turn(
        self, messages: Sequence[Message], items: Sequence[Items], *, ended: bool = True
    ) -> list[int]:
        """Return the ids of ``prompt`` after those of the last answer in the conversation.

        Args:
            messages: the whole conversation, with a new question at its end.
            items: of the images after the last answer.
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
        return self.expand(ids[first:], items)[0]

    def expand(
        self, ids: Sequence[int], items: Sequence[Items], weights: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Put all tokens of each image in place of one, with weight 0.

        Args:
            ids: a sequence with one token for each image.
            items: of its images.
            weights: of the tokens; all 0 unless given.
        """
        images = iter(items)
        tokens: list[int] = []
        expanded: list[float] = []
        for token, weight in zip(ids, weights or [0.0] * len(ids), strict=True):
            repeats = 1
            if token == self.tokenizer.image_token:
                weight, (encoder, number) = 0.0, next(images)
                if self.layout == "placeholder":
                    own, num_features = self.formats.by_encoder[encoder]
                    assert own is not None
                    token, repeats = own, number * num_features
            tokens += [token] * repeats
            expanded += [weight] * repeats
        return tokens, expanded

    def length(self, tokens: Sequence[int], items: Sequence[Items]) -> int:
        """Return the positions of the decoder that a sequence takes with its images."""
        in_front = sum(self.formats.num_features(items).values()) if self.layout == "prefix" else 0
        return len(tokens) + in_front

    def encoder_mask(self, tokens: Sequence[int], items: Sequence[Items]) -> dict[str, Tensor]:
        """Return which features each token may attend to, bool ``[s, n]`` by encoder, True: may."""
        ids = torch.tensor([list(tokens)])
        return {name: self._mask_of(name, ids, items) for name in self.formats.by_encoder}

    def _mask_of(self, name: str, ids: Tensor, items: Sequence[Items]) -> Tensor:
        token, num_features = self.formats.by_encoder[name]
        own = [index for index, (encoder, _) in enumerate(items) if encoder == name]
        features = torch.tensor([items[index].number for index in own], dtype=torch.long) * num_features
        if token is None:
            return torch.ones(ids.shape[1], int(features.sum()), dtype=torch.bool)
        if self.layout == "placeholder":
            before = features.cumsum(0) - features
            shown = (ids[0] == token).cumsum(0)[:, None] > before
        else:
            options: Any = {"features_per_image": 1, "num_images": len(items), "scope": self.scope}
            shown = image_mask(ids, token, **options)[0][:, own]
        return shown.repeat_interleave(features, dim=1)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the first stop token, without images."""
        ends = (index for index, token in enumerate(tokens) if token in self.stop_tokens)
        text = tokens[: next(ends, len(tokens))]
        images = {each.token for each in self.formats.by_encoder.values()}
        return self.tokenizer.decode([token for token in text if token not in images])

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
