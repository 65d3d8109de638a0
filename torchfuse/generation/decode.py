"""``generate``: one prompt and one answer a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.generation.caches import num_extra_tokens, num_slots
from torchfuse.generation.checks import Scores, answer_problems, input_id_problems
from torchfuse.generation.features import num_features
from torchfuse.generation.sampling import Generators, Sampling
from torchfuse.generation.session import Session
from torchfuse.generation.steps import bucket
from torchfuse.naming import find_model, unwrap

__all__ = ["evaluation_mode", "generate"]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    encoder_input: Mapping[str, Any] | None = None,
    encoder_embeds: Tensor | Mapping[str, Tensor] | None = None,
    encoder_mask: Tensor | Mapping[str, Tensor] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
    pad_id: int = 0,
    generator: Generators = None,
    compile: bool = False,
    stream: Callable[[Tensor], None] | None = None,
    scores: Scores = None,
) -> Any:
    """Continue prompts.

    Args:
        model: a fused model; it is put into evaluation mode for the call. Caches that it has already are
            used if they are empty and large enough, and are empty again afterwards.
        tokens: prompts, ``[b, s]``, shorter ones padded on the left by ``pad_id``.
        encoder_input: keywords of the encoder, as for the model's own call.
        encoder_embeds: what ``model.encode`` returned, in place of ``encoder_input``.
        encoder_mask: which features count, as for the model's call: bool ``[b, s, n]`` or ``[b, n]``,
            True: may be attended to. New tokens attend to what the last prompt token attends to.
        max_new_tokens: the most tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the likeliest tokens that together have this probability only.
        repetition_penalty: above 1 makes tokens that a row holds already less likely.
        stop_tokens: ids after which a row is finished, or a list of them for each row; generation ends
            when all rows are.
        pad_id: id of padding, in the prompt and after finished rows. The model must embed it.
        generator: source of randomness, on the device of ``tokens``; a list with one for each row makes
            a row's answer independent of the batch.
        compile: whether prompt and steps run as one compiled graph each. Graphs are kept: prompts of one
            bucket of lengths share one, and a second call compiles nothing.
        stream: called with the new token of every row, ``[b]``, as soon as it is chosen.
        scores: ``"logits"`` or ``"log_probs"`` to also return those of every step, before sampling.

    Returns:
        Prompts and new tokens, ``[b, s + n]`` with ``n <= max_new_tokens``; with ``scores``, a pair of
        that and ``[b, n, v]``.

    Raises:
        ConfigError: if arguments or ids are out of range, before any module runs.
        ModelError: if the sequence or the features do not fit the model, before the decoder runs.
    """
    model = find_model(model)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    problems = answer_problems(model, tokens, max_new_tokens, sampling, stop_tokens, generator, scores)
    problems += input_id_problems(model, {"pad_id": [pad_id]})
    if encoder_input is not None and encoder_embeds is not None:
        problems.append("give encoder_input or encoder_embeds, not both")
    if problems:
        raise ConfigError(f"generate: {'; '.join(problems)}.")
    fused: Any = model
    strategy = getattr(unwrap(model), "strategy", None)
    if strategy is not None:
        strategy.check_prompt(fused.encoder_names, tokens, encoder_mask)
    _room(fused, tokens.shape[1], 0, max_new_tokens, compile)  # before an encoder runs in vain
    with evaluation_mode(model):
        if encoder_input is not None:
            encoder_embeds = fused.encode(encoder_input)
        features = num_features(encoder_embeds)
        max_tokens = _room(fused, tokens.shape[1], features, max_new_tokens, compile)
        options = {"batch_size": tokens.shape[0], "max_tokens": max_tokens, "max_features": features}
        with Session(model, **options, pad_id=pad_id, compile=compile) as session:
            new, scored = session.answer(
                tokens,
                max_new_tokens=max_new_tokens,
                encoder_embeds=encoder_embeds,
                encoder_mask=encoder_mask,
                sampling=sampling,
                stop_tokens=stop_tokens,
                generator=generator,
                stream=stream,
                scores=scores,
            )
    sequence = torch.cat([tokens, new], dim=1)
    return sequence if scores is None else (sequence, scored)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        # FSDP2 leaves a root unsharded after a forward without backward, and an optimizer built then
        # would hold parameters that are thrown away.
        reshard = getattr(unwrap(model), "reshard", None)
        if callable(reshard):
            reshard()


def _room(model: Any, prompt: int, features: int, new: int, compiled: bool) -> int:
    """Return the tokens of text to make caches for, rounded where each number needs its own graph."""
    slots, limit = num_slots(model)
    extra = num_extra_tokens(model, features)
    most = slots - extra
    if prompt + new > most:
        raise ModelError(
            f"{prompt} prompt tokens, {extra} encoder tokens and {new} new ones are more than the "
            f"{limit} of {slots}."
        )
    if model.caches_are_setup():
        return most
    if not compiled:
        return prompt + new
    padded = bucket(prompt, most - new)
    return min(most, -(-(padded + new) // 64) * 64)
