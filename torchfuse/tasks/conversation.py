"""A conversation about images: text in, text out.

All turns so far stay in the caches, and the features of all images beside them: only the new question is
run, and no image is encoded twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.data.collate import unnamed
from torchfuse.data.encoder_items import Items
from torchfuse.data.media import MediaInput
from torchfuse.data.samples import Media, Message
from torchfuse.errors import ConfigError, DataError
from torchfuse.generation.session import Session
from torchfuse.naming import find_model, unwrap
from torchfuse.tasks.image_inputs import by_encoder, encode_each
from torchfuse.tasks.prompt_lengths import encode_turn, num_items
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.report import Report
from torchfuse.tasks.text_stream import TextStream

__all__ = ["Conversation"]


class Conversation:
    """Questions with images, each answered with all earlier turns in context.

    Use it as a context manager, or call ``close``, which gives the caches back.

    Args:
        model: a fused model without caches, in evaluation mode.
        settings: how messages become prompts, and how answers are generated.
        max_tokens: most tokens of text of all turns together, answers included.
        max_images: most images of all turns together; tiles and frames count one by one.
        system: text of the system message in front of the first question.
        report: what counts and times are added to.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: PromptSettings,
        *,
        max_tokens: int,
        max_images: int = 0,
        system: str | None = None,
        report: Report | None = None,
    ) -> None:
        self.model: Any = find_model(model)
        self.settings = settings
        self.max_tokens, self.max_images = max_tokens, max_images
        self.report = report or Report()
        self._device = next(model.parameters()).device
        self._session: Session | None = None
        self.reset(system)

    def reset(self, system: str | None = None, *, index: int = 0) -> None:
        """Start a new conversation; caches and graphs are used again.

        Args:
            system: text in front of its first question.
            index: the prompt's index, for the generator's seed.
        """
        if self._session is not None:
            self._session.reset()
        self.system = system
        self.messages = [] if system is None else [Message("system", [system])]
        self.tokens: list[int] = []
        self.media: list[Media] = []
        self._features: dict[Media, tuple[Items, Tensor]] = {}
        self._generator = self.settings.generator(index, self._device)

    @torch.no_grad()
    def ask(self, question: Message, *, stream: Callable[[str], object] | None = None) -> str:
        """Ask the next question.

        Args:
            question: a message of the user. An image of an earlier turn is not encoded again.
            stream: called with each piece of the answer's text as soon as it is generated.

        Returns:
            The answer.

        Raises:
            DataError: if the question cannot be encoded or does not fit any more; the conversation is
                unchanged then.
        """
        messages = [*self.messages, question]
        prompt, media = self._encode_turn(messages)
        session = self._open()
        self._check_room(session, prompt, question)
        given = self._encode_images(prompt, media)
        text = TextStream(self.settings.text, stream) if stream is not None else None

        def put(chosen: Tensor) -> None:
            token = int(chosen[0])
            if text is not None and token not in self.settings.stops:
                text.put(token)

        try:
            with self.report.timing("prefill", self._device) as begin:
                new, _ = session.answer(
                    torch.tensor([prompt], device=self._device),
                    max_new_tokens=self.settings.max_new_tokens,
                    sampling=self.settings.sampling,
                    stop_tokens=self.settings.stops,
                    generator=self._generator,
                    on_prefill=partial(begin, "decode"),
                    stream=None if text is None else put,
                    **given,
                )
        except BaseException:
            self.reset(self.system)  # the caches may hold half a turn
            raise
        answer = self.settings.until_stop(new[0].tolist())
        self.report.count(len(prompt), [answer])
        self.tokens += prompt + answer
        self.media += media
        self.messages = [*messages, Message("assistant", [self.settings.text(answer)])]
        if text is not None:
            text.end()
        return self.settings.text(answer)

    def _encode_turn(self, messages: list[Message]) -> tuple[list[int], list[Media]]:
        """Return the ids and media of a conversation that the caches lack.

        Where the template writes earlier turns otherwise once another follows, for example without their
        thoughts, the caches are emptied, and that is the whole conversation.
        """
        transform = self.settings.transform
        if self.tokens:
            # The answer before may have been cut short, or have ended with a token of the caller's.
            ended = self.tokens[-1] in transform.stop_tokens
            try:
                return encode_turn(transform, messages, first=False, ended=ended), messages[-1].media
            except ConfigError:
                self._open().reset()
                self.tokens, self.media = [], []
        all_media = [media for message in messages for media in message.media]
        return encode_turn(transform, messages, first=True), all_media

    def _check_room(self, session: Session, prompt: list[int], question: Message) -> None:
        """Raise a ``DataError`` unless a turn fits into what is left."""
        new, problems = self.settings.max_new_tokens, []
        if len(prompt) + new > session.room:
            problems.append(
                f"{len(prompt)} tokens and an answer of up to {new} do not fit into the {session.room} "
                f"that are left of {self.max_tokens}"
            )
        images = num_items(self.settings.transform, [*self.messages, question])
        if images > self.max_images:
            problems.append(f"it would be {images} images, and there is room for {self.max_images}")
        if problems:
            raise DataError(f"This turn does not fit any more: {'; '.join(problems)}.")

    def _open(self) -> Session:
        if self._session is None:
            self._session = Session(
                self.model,
                batch_size=1,
                max_tokens=self.max_tokens,
                max_features=self.settings.transform.formats.max_features(self.max_images),
                pad_id=self.settings.transform.pad_id,
                compile=self.settings.compile,
            )
        return self._session

    def _encode_images(self, prompt: list[int], media: list[Media]) -> dict[str, Any]:
        """Return a turn's features and their mask, as arguments of ``Session.answer``."""
        if not media:
            return {}
        self._add_features(media)
        transform, shown = self.settings.transform, [*self.media, *media]
        # Layers that cache keys and values of features replace all that they hold.
        kept = bool(getattr(unwrap(self.model).strategy, "caches_features", False))
        items = [self._features[each][0] for each in shown]
        masks = by_encoder(transform.encoder_mask(self.tokens + prompt, items))
        # With the row of the last answer's last token, which is run with this turn.
        rows = len(prompt) + bool(self.tokens)
        new = [self._features[each] for each in (shown if kept else media)]
        features = {}
        for name in dict.fromkeys(own.encoder for own, _ in new):
            features[name] = torch.cat([each for own, each in new if own.encoder == name], dim=1)
            last = features[name].shape[1]  # new features come last
            masks[name] = masks[name][-rows:, -last:][None].to(self._device)
        return {
            "encoder_embeds": unnamed(features),
            "encoder_mask": unnamed({name: masks[name] for name in features}),
        }

    def _add_features(self, media: list[Media]) -> None:
        """Encode those of these images that were not encoded before."""
        transform = self.settings.transform
        new: dict[str, dict[Media, MediaInput]] = {}
        for each in media:
            if each not in self._features:
                encoder = transform.formats.encoder_of(each.modality)
                new.setdefault(encoder, {})[each] = transform.media_input(each)
        for encoder, inputs in new.items():
            with self.report.timing("encode", self._device):
                features = encode_each(self.model, list(inputs.values()), encoder)
            self.report.images += len(inputs)
            for (each, given), found in zip(inputs.items(), features, strict=True):
                self._features[each] = Items(encoder, given.num_items), found

    def close(self) -> None:
        """Give the caches back."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
