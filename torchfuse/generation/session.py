"""A conversation with a model on one set of caches.

Prompts are padded on the left, so that every row's next token stands in the same column; padding is
masked and positions are counted from each row's first token, so that a row gives what it would give on
its own. What a row must not see again (padding behind a finished answer) is masked in the same way, so
that the next turn simply goes on behind it. Everything that changes from step to step is a tensor that
keeps its place: a step is one graph, and needs nothing from the host but the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.data.masks import left_padding
from torchfuse.errors import ModelError
from torchfuse.generation.caches import Caches
from torchfuse.generation.checks import Scores, answer_problems, num_features, stop_table, vocab_size
from torchfuse.generation.sampling import Generators, Sampling, sample
from torchfuse.generation.steps import bucket, compiled, next_logits, read_prompt
from torchfuse.naming import unwrap

__all__ = ["Session"]

# How often a device is asked whether all rows are finished; asking waits for it.
_CHECK_EVERY: Final = 8


class Session:
    """Caches of a model and what has been said on them.

    Use it as a context manager, or call ``close``: the caches are the model's until then.

    Args:
        model: a fused model, or a plain decoder, in evaluation mode. Caches that it has already are
            used and stay, otherwise they are set up and removed again.
        batch_size: rows.
        max_tokens: text of all turns together at most, prompts, their padding, and answers.
        max_features: encoder tokens of one turn at most.
        pad_id: id of padding, in prompts and behind finished rows.
        compile: whether prompts and steps run as one compiled graph each. Prompts are then padded to
            the lengths of ``bucket``, so that few graphs serve all.

    Raises:
        ModelError: if the model or its caches cannot hold as much, or the caches hold a sequence.

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
        fused: Any = model
        self.model = fused
        self.pad_id, self.compile, self.max_tokens = pad_id, compile, max_tokens
        self._caches = Caches(
            model, batch_size=batch_size, max_tokens=max_tokens, max_features=max_features
        )
        strategy = getattr(unwrap(model), "strategy", None)
        # Features in place of tokens need no room of their own.
        self.max_features = max_features
        self._keeps_features = strategy is not None and (
            strategy.caches_features or strategy.extra_tokens(1) > 0
        )
        special = () if strategy is None else strategy.special_tokens()
        with next(fused.tok_embeddings.parameters()).device:
            self._special = torch.tensor(special, dtype=torch.long)
            self._valid = torch.zeros(batch_size, self._caches.slots, dtype=torch.bool)
            self._count = torch.zeros(batch_size, dtype=torch.long)
            self._column = torch.zeros(1, dtype=torch.long)
        for state in (self._special, self._valid, self._count, self._column):
            # Recorded steps write where they did when they were recorded.
            torch._dynamo.mark_static_address(state, guard=False)
        # The last token of an answer, which the model has not read yet, and whether it counts.
        self._unread: tuple[Tensor, Tensor] | None = None
        self._seen: Tensor | None = None
        self.length = 0

    def reset(self) -> None:
        """Forget what has been said; caches and graphs stay for the next conversation."""
        self.model.reset_caches()
        for state in (self._valid, self._count, self._column):
            state.zero_()
        self._unread = self._seen = None
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
        stream: Callable[[Tensor], None] | None = None,
        scores: Scores = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Read a prompt behind what has been said, and answer it.

        Args:
            tokens: ids ``[b, s]``, padded on the left.
            max_new_tokens: how many tokens to add at most.
            encoder_embeds: features that this turn brings, as ``model.encode`` returns them. Without
                any, the turn sees what the last token of the turn before saw.
            encoder_mask: which features count, as for the model's own call.
            sampling: how tokens are chosen.
            stop_tokens: ids after which a row is finished; the same for all rows, or by row.
            generator: see ``sample``.
            stream: called with the new token of every row, ``[b]``, as soon as it is known.
            scores: ``"logits"`` or ``"log_probs"`` of every token at every step, before sampling.

        Returns:
            New tokens ``[b, n]``, and scores ``[b, n, v]`` if asked for.

        Raises:
            ModelError: if it does not fit into what is left of the session.
        """
        sampling = sampling or Sampling()
        problems = answer_problems(
            self.model, tokens, max_new_tokens, sampling, stop_tokens, generator, scores
        )
        if not problems:  # otherwise there may be no rows and columns to speak of
            problems = self._misfits(tokens, max_new_tokens, num_features(encoder_embeds))
        if problems:
            raise ModelError(f"answer: {'; '.join(problems)}.")
        padding = self._padding(tokens, max_new_tokens)
        stop = stop_table(stop_tokens, tokens)
        logits = self._read(tokens, padding, encoder_embeds, encoder_mask, sampling)
        finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        new: list[Tensor] = []
        kept: list[Tensor] = []
        alive: list[Tensor] = []
        always = stream is not None or tokens.device.type == "cpu"
        while True:
            if scores is not None:
                kept.append(logits.log_softmax(-1) if scores == "log_probs" else logits.clone())
            seen = None if self._seen is None else self._seen[:, :-1]
            chosen = sample(logits, **vars(sampling), seen=seen, generator=generator)
            chosen = chosen.to(tokens.dtype).masked_fill(finished, self.pad_id)
            new.append(chosen)
            self._remember(chosen, sampling)
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
        self._unread = (chosen, counts)
        num = int(torch.stack(alive).sum()) if stop.shape[1] else len(new)
        scored = torch.stack(kept[:num], dim=1) if kept else None
        return torch.stack(new[:num], dim=1), scored

    def _misfits(self, tokens: Tensor, max_new_tokens: int, features: int) -> list[str]:
        """What is too large for what is left of the session, in words."""
        rows, left = self._valid.shape[0], self.max_tokens - self.length
        length = tokens.shape[1] + int(self._unread is not None)
        problems = []
        if tokens.shape[0] != rows or length > left - (max_new_tokens - 1):  # the last is never read
            problems.append(
                f"this session has {rows} rows and room for {left} more tokens of text, got "
                f"{tokens.shape[0]} rows of {length} with {max_new_tokens} new ones to come"
            )
        if self._keeps_features and features > self.max_features:
            problems.append(
                f"this session has room for {self.max_features} encoder tokens a turn, got {features}"
            )
        return problems

    def _padding(self, tokens: Tensor, max_new_tokens: int) -> int:
        """By how much a prompt that fits is padded on the left."""
        if not self.compile:
            return 0
        length = tokens.shape[1] + int(self._unread is not None)
        return bucket(length, self.max_tokens - self.length - (max_new_tokens - 1)) - length

    def _read(
        self,
        tokens: Tensor,
        padding: int,
        embeds: Tensor | Mapping[str, Tensor] | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        sampling: Sampling,
    ) -> Tensor:
        """Logits ``[b, v]`` of the first token behind a prompt."""
        valid = left_padding(tokens, self.pad_id)
        front, front_valid = tokens[:, :0], valid[:, :0]
        if self._unread is not None:
            front, front_valid = (part[:, None] for part in self._unread)
        pads = tokens.new_full((tokens.shape[0], padding), self.pad_id)
        tokens = torch.cat([front, pads, tokens], dim=1)
        valid = torch.cat([front_valid, torch.zeros_like(pads, dtype=torch.bool), valid], dim=1)
        given: dict[str, Any] = {}
        if embeds is not None:
            mask = _widen(encoder_mask, tokens.shape[1])
            given = {"encoder_embeds": _detached(embeds), "encoder_mask": mask}
        run: Callable[..., Tensor] = read_prompt
        if self.compile:
            run = compiled(read_prompt, tokens.device.type)
            torch.compiler.cudagraph_mark_step_begin()
        logits = run(
            self.model, tokens, valid, self._valid, self._count, self._column, self._special, given
        )
        if self.compile and getattr(self.model, "cache_state", None) is not None:
            # The next recorded graph overwrites what this one returned.
            self.model.cache_state = _copied(self.model.cache_state)
        # The model may refuse what it is given; a turn is noted only after that.
        if sampling.repetition_penalty != 1:
            self._remember_all(tokens, valid)
        self._unread = None
        self.length += tokens.shape[1]
        return logits

    def _step(self, token: Tensor, counts: Tensor) -> Tensor:
        """Logits ``[b, v]`` of the token after this one."""
        run: Callable[..., Tensor] = next_logits
        if self.compile:
            run = compiled(next_logits, token.device.type)
            torch.compiler.cudagraph_mark_step_begin()
        logits = run(self.model, token, counts, self._valid, self._count, self._column, self._special)
        self.length += 1
        return logits

    def _remember_all(self, tokens: Tensor, valid: Tensor) -> None:
        """Note which tokens rows hold; those that the head does not score share a column."""
        vocab = vocab_size(self.model)
        if self._seen is None:
            self._seen = torch.zeros(tokens.shape[0], vocab + 1, dtype=torch.bool, device=tokens.device)
        elsewhere = ~valid | (tokens >= vocab) | (tokens < 0)
        self._seen.scatter_(1, tokens.masked_fill(elsewhere, vocab), True)

    def _remember(self, chosen: Tensor, sampling: Sampling) -> None:
        if sampling.repetition_penalty != 1:
            self._remember_all(chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool))

    def close(self) -> None:
        """Give the caches back: those that were there stay, empty; those set up for this go."""
        self._caches.release()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _copied(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {name: part.clone() for name, part in state.items()}
    return state.clone()


def _detached(embeds: Tensor | Mapping[str, Tensor]) -> Any:
    if isinstance(embeds, Mapping):
        return {name: part.detach() for name, part in embeds.items()}
    return embeds.detach()


def _widen(mask: Tensor | Mapping[str, Tensor] | None, length: int) -> Any:
    """A mask by token, for what stands in front of the prompt, too, which sees what its start does."""
    if isinstance(mask, Mapping):
        return {name: _widen(part, length) for name, part in mask.items()}
    if mask is None or mask.dim() == 2 or mask.shape[1] == length:
        return mask
    front = mask[:, :1].expand(-1, length - mask.shape[1], -1)
    return torch.cat([front, mask], dim=1)
