"""Answers to many samples, in batches of rows with any number of images.

Prompts of similar length with as many images share a batch, which pads least; each is sampled with a
generator of its own, so that its answer does not depend on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from torchfuse.data.collate import padded_collate_images, unnamed
from torchfuse.data.samples import Sample
from torchfuse.generation.decode import evaluation_mode
from torchfuse.generation.session import Session
from torchfuse.naming import find_model
from torchfuse.tasks.image_inputs import by_encoder, drop_padding, encode_images, inputs_by_encoder
from torchfuse.tasks.metrics import exact_match, references
from torchfuse.tasks.prompt_lengths import most_features, num_items, prompt_lengths
from torchfuse.tasks.prompt_settings import PromptSettings, required_slots
from torchfuse.tasks.report import Report

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True)
class Prediction:
    """A sample and the text that a model answered its prompt with."""

    sample: Sample
    text: str

    @property
    def is_correct(self) -> bool:
        """Whether the text is a reference answer of the sample, word for word."""
        return exact_match(self.text, references(self.sample)) == 1


@torch.no_grad()
def predict(
    model: nn.Module,
    settings: PromptSettings,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    report: Report | None = None,
    desc: str = "predict",
) -> list[Prediction]:
    """Answer the prompts of samples: their messages before the last answer.

    Args:
        model: a fused model without caches, or a decoder if no sample has an image; it is put into
            evaluation mode for the call.
        settings: how messages become prompts, and how answers are generated. Compiled, every batch is
            padded to the shape of the largest, so that a few graphs serve all.
        samples: samples with any number of images, mixed.
        batch_size: samples in a batch.
        report: what counts and times are added to.
        desc: label of the progress bar.

    Returns:
        The predictions, in the order of the samples.

    Raises:
        DataError: if a prompt cannot be encoded, before any is answered.
        ConfigError: if a prompt and its answer do not fit the model, before any is answered.
    """
    if not samples:
        return []
    model, transform = find_model(model), settings.transform
    lengths = prompt_lengths(transform, samples)
    items = [num_items(transform, sample.prompt) for sample in samples]
    longest, features_of = max(lengths), most_features(transform, [each.prompt for each in samples])
    max_features = sum(features_of.values())
    slots = required_slots(model, settings, [[n] for n in lengths], max_features, path="samples")
    order = sorted(range(len(samples)), key=lambda i: (items[i], lengths[i]))
    answers: dict[int, str] = {}
    report, rows = report or Report(), min(batch_size, len(samples))
    sizes = {"batch_size": rows, "max_tokens": slots, "max_features": max_features}
    bar = tqdm(total=len(samples), desc=desc, disable=None, leave=False)
    with (
        evaluation_mode(model),
        bar,
        Session(model, **sizes, pad_id=transform.pad_id, compile=settings.compile) as session,
    ):
        for start in range(0, len(order), rows):
            indices = order[start : start + rows]
            encoded = [transform(samples[i], with_answer=False) for i in indices]
            encoded += encoded[-1:] * (rows - len(indices))  # the caches have this many rows
            batch = padded_collate_images(encoded, transform.pad_id, pad_left=True)
            features = _encode(model, batch, report)
            report.images += sum(len(message.media) for i in indices for message in samples[i].prompt)
            if settings.compile:
                features = _pad(batch, features, longest, features_of, transform.pad_id)
            full = indices + indices[-1:] * (rows - len(indices))
            new = _answer(session, settings, batch, features, full, report)[: len(indices)]
            report.count(sum(lengths[i] for i in indices), new)
            answers |= {i: settings.text(answer) for i, answer in zip(indices, new, strict=True)}
            bar.update(len(indices))
    return [Prediction(sample, answers[i]) for i, sample in enumerate(samples)]


def _encode(model: nn.Module, batch: dict[str, Any], report: Report) -> Any:
    """Replace a batch's images by their features."""
    inputs = batch.pop("encoder_input", None)
    if inputs is None:
        return None
    device = next(model.parameters()).device
    with report.timing("encode", device):
        given = {
            name: {key: tensor.to(device) for key, tensor in each.items()}
            for name, each in inputs_by_encoder(inputs).items()
        }
        features = encode_images(model, unnamed(given))
    features, batch["encoder_mask"] = drop_padding(features, batch["encoder_mask"])
    return features


def _pad(
    batch: dict[str, Any], features: Any, length: int, num_features: Mapping[str, int], pad_id: int
) -> Any:
    """Pad a batch's tokens to one length, and its features, if it has any, to one number."""
    left = length - batch["tokens"].shape[1]
    batch["tokens"] = F.pad(batch["tokens"], (left, 0), value=pad_id)
    if features is None:
        return None
    padded, masks = by_encoder(features), by_encoder(batch["encoder_mask"])
    for name, each in padded.items():
        more = num_features[name] - each.shape[1]
        padded[name] = F.pad(each, (0, 0, 0, more))
        masks[name] = F.pad(masks[name], (0, more, left, 0))
    batch["encoder_mask"] = unnamed(masks)
    return unnamed(padded)


def _answer(
    session: Session,
    settings: PromptSettings,
    batch: dict[str, Any],
    features: Any,
    indices: Sequence[int],
    report: Report,
) -> list[list[int]]:
    """Return the answers of all rows, each up to its stop token."""
    device = next(session.model.parameters()).device
    generators = [settings.generator(i, device) for i in indices]
    masks = by_encoder(batch["encoder_mask"]) if "encoder_mask" in batch else {}
    session.reset()
    with report.timing("prefill", device) as begin:
        new, _ = session.answer(
            batch["tokens"].to(device),
            max_new_tokens=settings.max_new_tokens,
            encoder_embeds=features,
            encoder_mask=unnamed({n: m.to(device) for n, m in masks.items()}) if masks else None,
            sampling=settings.sampling,
            stop_tokens=settings.stops,
            generator=[generator for generator in generators if generator is not None] or None,
            on_prefill=partial(begin, "decode"),
        )
    return [settings.until_stop(row) for row in new.tolist()]
