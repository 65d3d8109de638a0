"""A conversation about images: text in, text out, on caches that stay.

What has been said stays in the caches, and what an image became stays beside them: a follow-up question
is read alone, and runs no encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.data.questions import Question
from torchfuse.errors import DataError
from torchfuse.naming import unwrap
from torchfuse.tasks.prompt_settings import PromptSettings, encode_images
from torchfuse.tasks.prompts import encode_turn
from torchfuse.tasks.report import Report, TimedSession
from torchfuse.tasks.text_stream import TextStream

__all__ = ["Conversation"]


class Conversation:
    """Questions with images, and answers that know of those before.

    Use it as a context manager, or call ``close``: the caches are the model's until then.

    Args:
        model: a fused model without caches, in evaluation mode.
        asking: how questions are put and answers made.
        max_tokens: text of all turns together at most, answers included.
        max_images: images of all turns together at most.
        system: text in front of the first question.
        report: notes what everything took.
    """

    def __init__(
        self,
        model: nn.Module,
        asking: PromptSettings,
        *,
        max_tokens: int,
        max_images: int = 0,
        system: str | None = None,
        report: Report | None = None,
    ) -> None:
        self.model: Any = model
        self.asking = asking
        self.max_tokens, self.max_images = max_tokens, max_images
        self.report = report or Report()
        self._device = next(model.parameters()).device
        self._session: TimedSession | None = None
        self.reset(system)

    def reset(self, system: str | None = None, *, index: int = 0) -> None:
        """Forget everything that has been said and shown; caches and graphs stay for what comes.

        Args:
            system: text in front of the first question to come.
            index: which prompt this is, for the generator's seed.
        """
        if self._session is not None:
            self._session.reset()
        self.system = system
        self.tokens: list[int] = []
        self.images: list[Path] = []
        self._features: dict[Path, Tensor] = {}
        self._generator = self.asking.generator(index, self._device)

    @torch.no_grad()
    def ask(self, question: Question, *, stream: Callable[[str], object] | None = None) -> str:
        """Ask the next question.

        Args:
            question: the question, with the images that come with it. The encoder does not run again on
                an image that was shown before.
            stream: called with each piece of the answer's text as soon as it is known.

        Returns:
            The answer.

        Raises:
            DataError: if the question cannot be encoded or does not fit any more; the conversation is
                as it was then, and can go on.
        """
        prompt = self._encode(question)
        self._check_room(prompt, question)
        given = self._features_for(prompt, question)
        session = self._open()
        text = TextStream(self.asking.text, stream) if stream is not None else None

        def put(chosen: Tensor) -> None:
            token = int(chosen[0])
            if text is not None and token not in self.asking.stops:
                text.put(token)

        try:
            new, _ = session.answer(
                torch.tensor([prompt], device=self._device),
                max_new_tokens=self.asking.max_new_tokens,
                sampling=self.asking.sampling,
                stop_tokens=self.asking.stops,
                generator=self._generator,
                stream=None if text is None else put,
                **given,
            )
        except BaseException:
            self.reset(self.system)  # nobody knows what the caches hold
            raise
        answer = self.asking.until_stop(new[0].tolist())
        session.count([answer])
        self.tokens += prompt + answer
        self.images += question.images
        if text is not None:
            text.end()
        return self.asking.text(answer)

    def _encode(self, question: Question) -> list[int]:
        first = not self.tokens
        asking = self.asking
        return encode_turn(asking.transform, asking.template, question, first=first, system=self.system)

    def _check_room(self, prompt: list[int], question: Question) -> None:
        """Raise a ``DataError`` unless a turn fits in what is left."""
        used = 0 if self._session is None else self._session.length
        left, new = self.max_tokens - used, self.asking.max_new_tokens
        # The last token of an answer is read with the next turn.
        length = len(prompt) + bool(self.tokens)
        problems = []
        if length + new - 1 > left:
            problems.append(
                f"{length} tokens and an answer of up to {new} do not fit into the {max(left, 0)} that "
                f"are left of {self.max_tokens}"
            )
        images = len(self.images) + len(question.images)
        if images > self.max_images:
            problems.append(f"it would be {images} images, and there is room for {self.max_images}")
        if problems:
            raise DataError(f"This turn does not fit any more: {'; '.join(problems)}.")

    def _open(self) -> TimedSession:
        if self._session is None:
            self._session = TimedSession(
                self.model,
                report=self.report,
                batch_size=1,
                max_tokens=self.max_tokens,
                max_features=self.max_images * self.asking.transform.features_per_image,
                pad_id=self.asking.transform.pad_id,
                compile=self.asking.compile,
            )
        return self._session

    def _features_for(self, prompt: list[int], question: Question) -> dict[str, Any]:
        """The features that a turn brings and which of its tokens see them, for ``Session.answer``."""
        if not question.images:
            return {}
        self._see(question.images)
        shown = [*self.images, *question.images]
        # Where layers keep keys and values of features, these take the place of all that were kept.
        kept = bool(getattr(unwrap(self.model).strategy, "caches_features", False))
        from_image = 0 if kept else len(self.images)
        n = self.asking.transform.features_per_image
        mask = self.asking.transform.encoder_mask(self.tokens + prompt, len(shown))
        # With the answer's last token, which is read now and sees what it saw when it was said.
        rows = mask[-(len(prompt) + bool(self.tokens)) :, from_image * n :]
        return {
            "encoder_embeds": torch.cat([self._features[path] for path in shown[from_image:]], dim=1),
            "encoder_mask": rows[None].to(self._device),
        }

    def _see(self, paths: tuple[Path, ...]) -> None:
        """Encode the images among these that were not shown before."""
        new = [path for path in dict.fromkeys(paths) if path not in self._features]
        if not new:
            return
        pixels = torch.stack([self.asking.transform.pixels(path) for path in new])
        features = encode_images(self.model, pixels[None].to(self._device), self.report, len(new))
        parts = features.chunk(len(new), dim=1)
        self._features |= dict(zip(new, parts, strict=True))

    def close(self) -> None:
        """Give the caches back."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
