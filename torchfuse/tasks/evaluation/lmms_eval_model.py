"""Finetuning runs as models of lmms-eval: ``lmms-eval --model torchfuse --model_args run=DIR``.

The extra ``eval`` installs lmms-eval, which finds the model through the entry point
``lmms_eval.models``. Of its two interfaces this is the simple one: the text of a task's document and its
visuals become one message of the user, and the run's template writes the prompt, as in training.
"""

from __future__ import annotations

import io
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image, ImageOps
from tqdm import tqdm

from torchfuse.data.readers.formats import FORMATS
from torchfuse.data.samples import Media, Message, Sample
from torchfuse.errors import ConfigError, DataError
from torchfuse.generation.caches import room_for_text
from torchfuse.generation.sampling import Sampling
from torchfuse.tasks.evaluation.answer_loss import answer_losses
from torchfuse.tasks.prediction import predict
from torchfuse.tasks.prompt_lengths import most_features, prompt_lengths
from torchfuse.tasks.prompt_settings import PromptSettings
from torchfuse.tasks.runs import read_run

__all__ = ["TorchfuseModel", "manifest"]

_NEW_TOKENS: Final = 1024  # where a task names no limit, as for other models of lmms-eval
_BATCHES: Final = 16  # whose visuals are in memory at once
_PNG_MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True)
class _Options:
    """What the ``generation_kwargs`` of a task ask for."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> _Options:
        """Read the keywords of a request.

        Raises:
            ConfigError: if they ask for beam search, or a value is out of range.
        """
        until = given.get("until") or ()
        temperature = float(given.get("temperature") or 0)
        if given.get("do_sample") is False:
            temperature = 0.0
        sampling = Sampling(temperature, top_k=given.get("top_k"), top_p=given.get("top_p"))
        problems = sampling.problems()
        if (beams := given.get("num_beams") or 1) != 1:
            problems.append(f"num_beams must be 1, got {beams}: there is no beam search")
        if problems:
            raise ConfigError(f"generation_kwargs: {'; '.join(problems)}.")
        limit = int(given.get("max_new_tokens") or _NEW_TOKENS)
        return cls((until,) if isinstance(until, str) else tuple(until), limit, sampling)

    def cut(self, text: str) -> str:
        """Return a text up to the first of the strings that end an answer."""
        ends = [text.find(end) for end in self.until if end and end in text]
        return text[: min(ends)] if ends else text


class TorchfuseModel(lmms):
    """A finetuning run as a model of lmms-eval.

    Args:
        run: the run's ``output_dir``.
        device: the model's device; None: CUDA if there is any, each rank's own under a launcher.
        dtype: dtype of the weights: ``"fp32"`` or ``"bf16"``.
        batch_size: requests that are answered at once.
        seed: of the tokens that are drawn where a task samples.
        max_batch_size: lmms-eval's argument, which is not used.

    Raises:
        ConfigError: if an argument or the run's configuration is wrong.
        CheckpointError: if a checkpoint is wrong or does not fit.
    """

    is_simple = True

    def __init__(
        self,
        run: str,
        device: str | None = None,
        dtype: str = "fp32",
        batch_size: int | str = 1,
        seed: int = 0,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        self.batch_size, self.seed = int(batch_size), seed
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.transform = read_run(run)(place, dtype)
        PromptSettings(self.transform).check(self.model)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answer requests.

        Args:
            requests: their arguments are context, ``generation_kwargs``, ``doc_to_visual``, index of the
                document, task and split. Those with equal keywords share batches.

        Returns:
            The answers, each up to the first string of ``until``.
        """
        by_options: dict[_Options, list[int]] = {}
        for index, request in enumerate(requests):
            by_options.setdefault(_Options.read(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        with self._bar(len(requests)) as bar:
            for options, group in by_options.items():
                for indices in self._chunks(group):
                    samples = [self._sample(requests[i].args) for i in indices]
                    settings = self._settings(options, samples)
                    found = predict(self.model, settings, samples, batch_size=self.batch_size)
                    for index, prediction in zip(indices, found, strict=True):
                        texts[index] = options.cut(prediction.text)
                        request = requests[index].args[:2]
                        self.cache_hook.add_partial("generate_until", request, texts[index])
                    bar.update(len(indices))
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Compute the loss of continuations, and whether each is what the model would answer.

        lmms-eval takes the choice with the *least* value: as its other models do, this returns the mean
        loss a token, the end of the turn included, and no log-likelihood.

        Args:
            requests: their arguments are context, continuation or ``doc_to_target``, ``doc_to_visual``,
                index of the document, task and split.
        """
        results: list[tuple[float, bool]] = []
        with self._bar(len(requests)) as bar:
            for indices in self._chunks(range(len(requests))):
                samples = [self._sample(requests[i].args, answered=True) for i in indices]
                losses = answer_losses(self.model, self.transform, samples, batch_size=self.batch_size)
                results += [(loss.mean, loss.is_greedy) for loss in losses]
                bar.update(len(indices))
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise ConfigError(
            "The model torchfuse does not implement generate_until_multi_round: choose tasks whose "
            "output_type is generate_until, loglikelihood or multiple_choice."
        )

    def _bar(self, total: int) -> Any:
        return tqdm(total=total, desc="torchfuse", disable=None if self.rank == 0 else True)

    def _chunks(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        size = _BATCHES * self.batch_size
        return (indices[start : start + size] for start in range(0, len(indices), size))

    def _settings(self, options: _Options, samples: Sequence[Sample]) -> PromptSettings:
        """Return the settings of prompts, with answers no longer than what fits the model."""
        features = most_features(self.transform, [sample.prompt for sample in samples])
        longest = max(prompt_lengths(self.transform, samples))
        room = room_for_text(self.model, sum(features.values())) - longest
        limit = min(options.max_new_tokens, max(1, room))
        if limit < options.max_new_tokens:
            logger.warning(f"{limit} new tokens fit the model, not {options.max_new_tokens}.")
        return PromptSettings(self.transform, options.sampling, limit, seed=self.seed)

    def _sample(self, arguments: Sequence[Any], *, answered: bool = False) -> Sample:
        """Return the sample of a request; the second argument is the answer if it is answered.

        Raises:
            DataError: if visuals and tags differ in number, or a visual is of no known type.
            ConfigError: if the request has no document.
        """
        if len(arguments) != 6:
            raise ConfigError(
                "A request without a document (acc_mutual_info) cannot be answered; remove that metric."
            )
        context, target, doc_to_visual, index, task, split = arguments
        document = self.task_dict[task][split][index]
        origin = f"{task}, {split}, document {index}"
        record: dict[str, Any] = {"question": context}
        try:
            for visual in _flat(doc_to_visual(document) if doc_to_visual else None):
                media = _media(visual)
                record.setdefault(f"{media.modality}s", []).append(media)
            messages = list(FORMATS["question"].read(record, Path(), origin).messages)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from error
        if answered:
            answer = target if isinstance(target, str) else target(document)
            messages.append(Message("assistant", [str(answer).strip()]))
        return Sample(messages, {}, origin)


def _flat(visuals: Any) -> list[Any]:
    """Return visuals as one list; tasks return one, a list, or lists of them."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [visual for part in visuals for visual in _flat(part)]
    return [visuals]


def _media(visual: Any) -> Media:
    if isinstance(visual, Image.Image):
        image = ImageOps.exif_transpose(visual)
        file = io.BytesIO()
        image = image if image.mode in _PNG_MODES else image.convert("RGB")
        image.save(file, format="PNG", compress_level=1)
        return Media(data=file.getvalue(), name="image")
    if isinstance(visual, str | Path):
        kind = mimetypes.guess_type(str(visual))[0] or "video"
        return Media(Path(visual), modality="image" if kind.startswith("image/") else "video")
    raise DataError(f"a visual must be an image or the path of a video, got a {type(visual).__name__}")


def manifest() -> Any:
    """Return the ``ModelManifest`` that lmms-eval registers the model by."""
    # Importing it registers the models of all entry points, this one too.
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{TorchfuseModel.__module__}.{TorchfuseModel.__name__}"
    return ModelManifest(model_id="torchfuse", simple_class_path=path)
