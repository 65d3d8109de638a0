"""Text from a fused model: rows of any length with any number of images, in one batch.

Prompts are padded on the left, so that every row's next token stands in the same column; padding is
masked and positions are counted from each row's first token, so that a row gives what it would give on
its own. Encoders run once, before the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.data.masks import causal_mask, left_padding, positions
from torchfuse.naming import unwrap

__all__ = ["generate", "sample"]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens: Tensor,
    *,
    encoder_input: Mapping[str, Any] | None = None,
    encoder_mask: Tensor | Mapping[str, Tensor] | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue prompts.

    Args:
        model: a fused model; it is put into evaluation mode for the call.
        tokens: prompts, ``[b, s]``, shorter ones padded on the left by ``pad_id``.
        encoder_input: keywords of the encoder, as for the model's own call.
        encoder_mask: which features count, as for the model's own call, ``[b, s, n]`` or ``[b, n]``. New
            tokens see what the last prompt token sees.
        max_new_tokens: how many tokens to add at most.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: sample from this many likeliest tokens only.
        top_p: sample from the likeliest tokens that together have this probability only.
        stop_tokens: ids after which a row is finished; generation ends when all rows are.
        pad_id: id of padding, in the prompt and behind finished rows.
        generator: source of randomness, on the device of ``tokens``.
        stream: called with the new token of every row, ``[b]``, as soon as it is known.

    Returns:
        Prompts and new tokens, ``[b, s + n]`` with ``n <= max_new_tokens``.

    Raises:
        ValueError: if the arguments are out of range or the sequence does not fit the model; nothing but
            the encoders has run then.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, top_p)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        steps = _Steps(model, tokens, encoder_input, encoder_mask, max_new_tokens, pad_id)
        with steps.caches():
            stop = torch.tensor(list(stop_tokens), dtype=tokens.dtype, device=tokens.device)
            finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
            logits = steps.prefill()
            new: list[Tensor] = []
            while True:
                chosen = sample(
                    logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
                ).to(tokens.dtype)
                new.append(chosen.masked_fill(finished, pad_id))
                if stream is not None:
                    stream(new[-1])
                finished = finished | torch.isin(chosen, stop)
                if len(new) == max_new_tokens or (stop.numel() and bool(finished.all())):
                    return torch.cat([tokens, torch.stack(new, dim=1)], dim=1)
                logits = steps.step(new[-1])
    finally:
        for module, training in modes:
            module.training = training
        # FSDP2 leaves a root unsharded after a forward without backward, and an optimizer built then
        # would hold parameters that are thrown away.
        reshard = getattr(unwrap(model), "reshard", None)
        if callable(reshard):
            reshard()


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: ``[b, v]``.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among this many likeliest tokens.
        top_p: choose among the fewest likeliest tokens that together have at least this probability.
        generator: source of randomness.

    Returns:
        Ids, ``[b]``.

    Examples:
        >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0)
        tensor([1])
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        weakest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token goes if those before it suffice without it; the first never does.
        enough = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


class _Steps:
    """One prefill and any number of steps on the model's caches."""

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        encoder_input: Mapping[str, Any] | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        max_new_tokens: int,
        pad_id: int,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.given: dict[str, Any] = {}
        num_features = 0
        if encoder_input is not None:
            embeds = model.encode(encoder_input)
            self.given = {"encoder_embeds": embeds, "encoder_mask": encoder_mask}
            parts = embeds.values() if isinstance(embeds, Mapping) else [embeds]
            num_features = sum(part.shape[1] for part in parts)
        self.num_features = num_features
        strategy = getattr(unwrap(model), "strategy", None)
        extra = 0 if strategy is None else strategy.extra_tokens(num_features)
        length = tokens.shape[1] + max_new_tokens
        self.slots = length + extra
        if self.slots > model.max_seq_len:
            raise ValueError(
                f"{tokens.shape[1]} prompt tokens, {extra} encoder tokens and {max_new_tokens} new ones "
                f"are more than the model's max_seq_len of {model.max_seq_len}."
            )
        special = () if strategy is None else strategy.special_tokens()
        self.special = torch.tensor(special, dtype=torch.long, device=tokens.device)
        valid = left_padding(tokens, pad_id)
        valid = torch.cat([valid, valid.new_ones(tokens.shape[0], max_new_tokens)], dim=1)
        self.mask = causal_mask(valid, slots=self.slots)
        self.positions = positions(valid)
        self.column = tokens.shape[1]

    def caches(self) -> Any:
        from torchtune.modules.common_utils import local_kv_cache

        table = next(self.model.tok_embeddings.parameters())
        kind = table.device.type
        autocast = torch.is_autocast_enabled(kind)
        return local_kv_cache(
            self.model,
            batch_size=self.tokens.shape[0],
            device=table.device,
            dtype=torch.get_autocast_dtype(kind) if autocast else table.dtype,
            encoder_max_seq_len=self.num_features or 1,
            decoder_max_seq_len=self.slots,
        )

    def prefill(self) -> Tensor:
        """Logits ``[b, v]`` of the first new token."""
        at = slice(0, self.column)
        return self._score(self.tokens, at, **self.given)

    def step(self, token: Tensor) -> Tensor:
        """Logits ``[b, v]`` of the token after this one, which sees what the last prompt token saw."""
        at = slice(self.column, self.column + 1)
        self.column += 1
        return self._score(token[:, None], at)

    def _score(self, tokens: Tensor, at: slice, **given: Any) -> Tensor:
        output = self.model(tokens, mask=self.mask[:, at], input_pos=self.positions[:, at], **given)
        while isinstance(output, list):  # hidden states in front, or chunks of the sequence
            output = output[-1]
        logits: Tensor = output[:, -1]
        # A token that stands for a feature is nothing to say; many lie outside the vocabulary.
        banned = torch.isin(torch.arange(logits.shape[-1], device=logits.device), self.special)
        return logits.masked_fill(banned, -torch.inf)


def _check(
    model: Any,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    faults = []
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        faults.append(f"tokens must be ids [b, s], got {tokens.dtype} {list(tokens.shape)}")
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        faults.append(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        faults.append(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        faults.append(f"top_p must lie in (0, 1], got {top_p}")
    if model.caches_are_setup():
        faults.append("caches are set up already (torchtune.modules.delete_kv_caches removes them)")
    if faults:
        raise ValueError(f"generate: {'; '.join(faults)}.")
