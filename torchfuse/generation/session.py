"""Several turns on one set of caches.

Prompts are padded on the left, so that every row's next token has the same column; padding is masked and
positions are counted from each row's first token, so that a row's result is that of the row alone. What
a row must not attend to later (padding after a finished answer) is masked in the same way, so that the
next turn is written after it. Everything that changes from step to step is a tensor with a fixed
address: a step is one graph, and needs nothing from the host but the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.data.masks import left_padding
from torchfuse.errors import ConfigError, ModelError
from torchfuse.generation.caches import Caches
from torchfuse.generation.checks import (
    Scores,
    answer_problems,
    input_id_problems,
    special_tokens,
    stop_table,
    vocab_size,
)
from torchfuse.generation.features import detach, extend_mask, num_features
from torchfuse.generation.sampling import Generators, Sampling, SeenTokens, sample
from torchfuse.generation.steps import bucket, compiled, next_logits, run_prompt
from torchfuse.models.types import CacheState
from torchfuse.naming import find_model, unwrap

__all__ = ["Session"]

# After how many steps the host checks whether all rows are finished, for which it waits for the device.
_CHECK_EVERY: Final = 8


class Session:
    """A conversation with a model, batched: prompts and answers, turn by turn, on caches that are kept.

    Use it as a context manager, or call ``close``, which gives the caches back.

    Args:
        model: a fused model, or a plain decoder, in evaluation mode. Caches that it has already are
            used and kept; otherwise caches are set up, and removed by ``close``.
        batch_size: rows.
        max_tokens: most tokens of text of all turns together: prompts, their padding, and answers.
        max_features: most encoder tokens of one turn.
        pad_id: id of padding, in prompts and after finished rows. The model must embed it.
        compile: whether prompts and steps run as one compiled graph each. Prompts are then padded to
            the lengths of ``bucket``, so that they share a few graphs.

    Raises:
        ConfigError: if the model does not embed ``pad_id``.
        ModelError: if the model or its caches are too small, or the caches hold a sequence.

    Examples:
        >>> from torchtune.models.llama3_2 import llama3_2
        >>> decoder = llama3_2(
        ...     vocab_size=11, num_layers=2, num_heads=3, num_kv_heads=1, embed_dim=12, max_seq_len=32
        ... ).eval()
        >>> with Session(decoder, batch_size=1, max_tokens=20) as session:
        ...     first, _ = session.answer(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
        ...     second, _ = session.answer(torch.tensor([[5, 6]]), max_new_tokens=3)
        >>> first.shape, second.shape, session.length
        (torch.Size([1, 4]), torch.Size([1, 3]), 11)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        max_tokens: int,
        max_features: int = 0,
        pad_id: int = 0,
        compile: bool = False,
    ) -> None:
        fused: Any = find_model(model)
        if problems := input_id_problems(fused, {"pad_id": [pad_id]}):
            raise ConfigError(f"Session: {'; '.join(problems)}.")
        self.model = fused
        self.pad_id, self.compile, self.max_tokens = pad_id, compile, max_tokens
        self._caches = Caches(
            fused, batch_size=batch_size, max_tokens=max_tokens, max_features=max_features
        )
        strategy = getattr(unwrap(fused), "strategy", None)
        # Features in place of tokens need no room of their own.
        self.max_features = max_features
        self._keeps_features = strategy is not None and (
            strategy.caches_features or strategy.extra_tokens(1) > 0
        )
        with next(fused.tok_embeddings.parameters()).device:
            self._special = torch.tensor(special_tokens(fused), dtype=torch.long)
            self._valid = torch.zeros(batch_size, self._caches.slots, dtype=torch.bool)
            self._count = torch.zeros(batch_size, dtype=torch.long)
            self._column = torch.zeros(1, dtype=torch.long)
        for state in (self._special, self._valid, self._count, self._column):
            # A recorded graph writes to the addresses of its recording.
            torch._dynamo.mark_static_address(state, guard=False)
        # The last token of an answer, which is in no cache yet, and whether it counts.
        self._pending: tuple[Tensor, Tensor] | None = None
        self._seen = SeenTokens(batch_size, vocab_size(fused), self._count.device)
        self.length = 0

    @property
    def room(self) -> int:
        """How many tokens the next prompt and its answer can have together."""
        # A pending token is run with the next prompt; the last new one is in no cache.
        return self.max_tokens - self.length - int(self._pending is not None) + 1

    def reset(self) -> None:
        """Empty the caches for a new conversation; they and the graphs are used again."""
        self.model.reset_caches()
        for state in (self._valid, self._count, self._column):
            state.zero_()
        self._pending = None
        self._seen.reset()
        self.length = 0

    @torch.no_grad()
    def answer(
        self,
        tokens: Tensor,
        *,
        max_new_tokens: int,
        encoder_embeds: Tensor | Mapping[str, Tensor] | None = None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None = None,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | Sequence[Sequence[int]] = (),
        generator: Generators = None,
        on_prefill: Callable[[], None] | None = None,
        stream: Callable[[Tensor], None] | None = None,
        scores: Scores = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Append a prompt to the conversation, and generate its answer.

        Args:
            tokens: ids ``[b, s]``, padded on the left.
            max_new_tokens: the most tokens to add.
            encoder_embeds: new features of this turn, as ``model.encode`` returns them. None: the turn
                attends to the features that the last token of the turn before attended to.
            encoder_mask: which features count, as for the model's own call.
            sampling: how tokens are chosen.
            stop_tokens: ids after which a row is finished; the same for all rows, or by row.
            generator: see ``sample``.
            on_prefill: called once, when the model has run on the prompt, before any token is chosen.
            stream: called with the new token of every row, ``[b]``, as soon as it is chosen.
            scores: ``"logits"`` or ``"log_probs"`` to also return those of every step, before sampling.

        Returns:
            New tokens ``[b, n]``, and scores ``[b, n, v]``, or None without ``scores``.

        Raises:
            ConfigError: if an argument is out of range.
            ModelError: if the turn does not fit into what is left of the session. The conversation is
                unchanged in both cases.
        """
        sampling = sampling or Sampling()
        if problems := answer_problems(
            self.model, tokens, max_new_tokens, sampling, stop_tokens, generator, scores
        ):
            raise ConfigError(f"answer: {'; '.join(problems)}.")
        if problems := self._room_problems(tokens, max_new_tokens, num_features(encoder_embeds)):
            raise ModelError(f"answer: {'; '.join(problems)}.")
        padding = self._padding(tokens, max_new_tokens)
        stop = stop_table(stop_tokens, tokens)
        logits = self._prefill(tokens, padding, encoder_embeds, encoder_mask, sampling)
        if on_prefill is not None:
            on_prefill()
        return self._decode(logits, max_new_tokens, sampling, stop, generator, stream, scores)

    def _decode(
        self,
        logits: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Tensor,
        generator: Generators,
        stream: Callable[[Tensor], None] | None,
        scores: Scores,
    ) -> tuple[Tensor, Tensor | None]:
        """Generate tokens until all rows are finished, from the logits of the first."""
        finished = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        new: list[Tensor] = []
        kept: list[Tensor] = []
        alive: list[Tensor] = []
        penalized = sampling.repetition_penalty != 1
        always = stream is not None or logits.device.type == "cpu"
        while True:
            if scores is not None:
                kept.append(logits.log_softmax(-1) if scores == "log_probs" else logits.clone())
            seen = self._seen.mask if penalized else None
            chosen = sample(logits, **vars(sampling), seen=seen, generator=generator)
            chosen = chosen.to(stop.dtype).masked_fill(finished, self.pad_id)
            new.append(chosen)
            if penalized:
                self._seen.add(chosen[:, None])
            if stream is not None:
                stream(chosen)
            counts = ~finished
            finished = finished | (chosen[:, None] == stop).any(dim=1)
            alive.append(counts.any())
            done = len(new) == max_new_tokens
            if not done and stop.shape[1] and (always or len(new) % _CHECK_EVERY == 0):
                done = bool(finished.all())
            if done:
                break
            logits = self._step(chosen, counts)
        self._pending = (chosen, counts)
        num = int(torch.stack(alive).sum()) if stop.shape[1] else len(new)
        scored = torch.stack(kept[:num], dim=1) if kept else None
        return torch.stack(new[:num], dim=1), scored

    def _room_problems(self, tokens: Tensor, max_new_tokens: int, features: int) -> list[str]:
        """Return what is too large for what is left of the session."""
        rows, problems = self._valid.shape[0], []
        if tokens.shape[0] != rows or tokens.shape[1] + max_new_tokens > self.room:
            problems.append(
                f"this session has {rows} rows and room for {self.room} more tokens of text, got "
                f"{tokens.shape[0]} rows of {tokens.shape[1]} and {max_new_tokens} new ones"
            )
        if self._keeps_features and features > self.max_features:
            problems.append(
                f"this session has room for {self.max_features} encoder tokens a turn, got {features}"
            )
        return problems

    def _padding(self, tokens: Tensor, max_new_tokens: int) -> int:
        """Return by how many tokens a prompt is padded on the left."""
        if not self.compile:
            return 0
        pending = int(self._pending is not None)
        length = tokens.shape[1] + pending
        return bucket(length, self.room + pending - max_new_tokens) - length

    def _prefill(
        self,
        tokens: Tensor,
        padding: int,
        embeds: Tensor | Mapping[str, Tensor] | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        sampling: Sampling,
    ) -> Tensor:
        """Run the model on a prompt; return the logits ``[b, v]`` of the token after it."""
        valid = left_padding(tokens, self.pad_id)
        front, front_valid = tokens[:, :0], valid[:, :0]
        if self._pending is not None:
            front, front_valid = (part[:, None] for part in self._pending)
        pads = tokens.new_full((tokens.shape[0], padding), self.pad_id)
        tokens = torch.cat([front, pads, tokens], dim=1)
        valid = torch.cat([front_valid, torch.zeros_like(pads, dtype=torch.bool), valid], dim=1)
        given: dict[str, Any] = {}
        if embeds is not None:
            mask = extend_mask(encoder_mask, tokens.shape[1])
            given = {"encoder_embeds": detach(embeds), "encoder_mask": mask}
        run: Callable[..., Tensor] = run_prompt
        if self.compile:
            run = compiled(run_prompt, tokens.device.type)
            torch.compiler.cudagraph_mark_step_begin()
        logits = run(
            self.model, tokens, valid, self._valid, self._count, self._column, self._special, given
        )
        state: CacheState | None = getattr(self.model, "cache_state", None)
        if self.compile and state is not None:
            # The next recorded graph overwrites what this one returned.
            self.model.cache_state = state.clone()
        # The model may raise; nothing of the turn is recorded before it has run.
        if sampling.repetition_penalty != 1:
            self._seen.add(tokens, valid)
        self._pending = None
        self.length += tokens.shape[1]
        return logits

    def _step(self, token: Tensor, counts: Tensor) -> Tensor:
        """Run the model on one token a row; return the logits ``[b, v]`` of the next."""
        run: Callable[..., Tensor] = next_logits
        if self.compile:
            run = compiled(next_logits, token.device.type)
            torch.compiler.cudagraph_mark_step_begin()
        logits = run(self.model, token, counts, self._valid, self._count, self._column, self._special)
        self.length += 1
        return logits

    def close(self) -> None:
        """Give the caches back: the model's own are emptied, those that were set up are removed."""
        self._caches.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
