"""Experts choose tokens: the routing of Mixture of Modality-Aware Experts.

The paper (https://arxiv.org/abs/2407.21770, sections 2.2 to 2.4) lets each expert take the ``k`` tokens
that score highest with it, so that every expert has the same load without a loss for balance. The choice
depends on all tokens, those of other rows and later ones too, so it is for training only. An auxiliary
router learns to predict from a token alone whether each expert takes it, and is used in evaluation.
Its loss joins the backward pass at the experts' output, so any training loop trains it, and its inputs
are detached, so its gradient reaches nothing else.

Shapes never depend on values: ``k`` places are filled from the static number of tokens, and what was
taken beyond the ``k`` of those that count has weight zero.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.modules.experts.auxiliary_loss import add_loss
from torchfuse.modules.experts.routing import keep_in_graph

__all__ = [
    "Dispatch",
    "ExpertChoiceRouter",
    "ModalityExperts",
    "logistic_noise",
    "num_taken",
]

_Count = TypeVar("_Count", int, Tensor)


def num_taken(num_tokens: _Count, capacity: Fraction) -> _Count:
    """Return how many of ``n`` tokens an expert takes, ``min(n, max(1, ceil(capacity * n)))``.

    Examples:
        >>> [num_taken(n, Fraction(1, 3)) for n in (0, 1, 3, 4)]
        [0, 1, 1, 2]
    """
    share = (num_tokens * capacity.numerator + capacity.denominator - 1) // capacity.denominator
    if isinstance(num_tokens, Tensor):
        return torch.minimum(share.clamp(min=1), num_tokens)
    return min(max(share, 1), num_tokens)


def logistic_noise(like: Tensor) -> Tensor:
    """Draw logistic noise: one Gumbel(0, 1) variable minus another, for each element."""
    return torch.rand_like(like).logit(eps=torch.finfo(like.dtype).eps / 2)


class Dispatch(NamedTuple):
    """Which tokens each expert runs on, and the weights of its outputs.

    Attributes:
        tokens: indices of tokens, ``[E, k]``, each once in a row; None: every expert runs on all ``n``.
        weights: ``[E, k]`` (``[E, n]``), zero where the expert did not take the token.
        loss: the auxiliary router's, a scalar; None where nothing is learned.
    """

    tokens: Tensor | None
    weights: Tensor
    loss: Tensor | None

    def combine(self, x: Tensor, experts: nn.ModuleList) -> Tensor:
        """Run the experts on their tokens of ``x``, ``[n, d]``, and sum their outputs for each token."""
        y = torch.zeros_like(x)
        for index, expert in enumerate(experts):
            weight = self.weights[index].unsqueeze(-1)
            if self.tokens is None:
                y = y + (weight * expert(x)).to(y.dtype)
            else:
                # One expert at a time: no token twice, so that the sum has one order on any device.
                tokens = self.tokens[index]
                y.index_add_(0, tokens, (weight * expert(x[tokens])).to(y.dtype))
        return y


class ExpertChoiceRouter(nn.Module):
    """Score tokens for experts, ``sigmoid(x W)``, and choose which expert takes which.

    In training, and without an auxiliary router in evaluation too, each expert takes its best tokens of
    all. In evaluation an expert takes the tokens that the auxiliary router, two linear maps with SiLU
    between them, gives it with a probability above one half.

    Scores are computed in float32 at least. An expert whose capacity is 1 takes every token, and
    gets no auxiliary router.

    Args:
        dim: width of a token.
        num_experts: how many experts choose.
        capacity: the share of the tokens that each of them takes, in (0, 1].
        noise: whether logistic noise is added to the scores in training.
        auxiliary_dim: width between the two maps of the auxiliary router; None: there is none.

    Attributes:
        taken: how many tokens each expert took when the router last ran, ``[E]``.
        num_tokens: how many tokens there were.
    """

    taken: Tensor
    num_tokens: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity: Fraction,
        noise: bool = True,
        auxiliary_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.auxiliary: nn.Module | None = None
        if auxiliary_dim is not None and capacity < 1:
            self.auxiliary = nn.Sequential(
                OrderedDict(
                    w1=nn.Linear(dim, auxiliary_dim),
                    activation=nn.SiLU(),
                    w2=nn.Linear(auxiliary_dim, num_experts),
                )
            )
        # Counts are in no checkpoint, so they have memory even if weights are on the meta device.
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        counts = torch.zeros(num_experts, dtype=torch.long, device=device)
        self.register_buffer("taken", counts, persistent=False)
        self.register_buffer("num_tokens", counts.new_zeros(()), persistent=False)

    @property
    def depends_on_batch(self) -> bool:
        """Whether the choice of a token depends on the rest of the batch in evaluation too."""
        return self.auxiliary is None and self.capacity < 1

    def forward(self, x: Tensor, valid: Tensor | None = None, *, stand_in: bool = False) -> Dispatch:
        """Choose which expert takes which tokens.

        Args:
            x: tokens, ``[n, d]``, of the whole batch.
            valid: which of them count, bool ``[n]``; no expert takes the others. None: all.
            stand_in: whether the tokens are none of the batch: no noise, and nothing is counted.
        """
        if valid is None:
            valid = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        scores = self._scores(x)
        predicted = None
        if self.auxiliary is not None:
            predicted = self.auxiliary(x.detach()).to(scores.dtype)
        if predicted is not None and not self.training:
            taken = (predicted > 0) & valid.unsqueeze(-1)  # a probability above one half
            weights = torch.where(taken, scores.sigmoid(), 0)
            dispatch = Dispatch(None, weights.t(), None)
        else:
            if self.training and self.noise and not stand_in:
                scores = scores + logistic_noise(scores)
            tokens, weights, taken = self._choose(scores, valid)
            loss = None if predicted is None else _prediction_loss(predicted, taken, valid)
            dispatch = Dispatch(tokens.t(), weights.t(), loss)
        if not stand_in:
            self._count(taken, valid)
        return dispatch

    def _scores(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def _choose(self, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return each expert's best tokens ``[k, E]``, their weights, and which it takes, ``[n, E]``."""
        places = num_taken(scores.shape[0], self.capacity)
        best = scores.detach().masked_fill(~valid.unsqueeze(-1), -torch.inf).topk(places, dim=0).indices
        rank = torch.arange(places, device=scores.device).unsqueeze(-1)
        counts = (rank < num_taken(valid.sum(), self.capacity)).expand_as(best)
        weights = torch.where(counts, scores.sigmoid().gather(0, best), 0)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter(0, best, counts)
        return best, weights, taken

    @torch.no_grad()
    def _count(self, taken: Tensor, valid: Tensor) -> None:
        if self.taken.device != valid.device:  # weights that got their memory later may be elsewhere
            self.taken = torch.zeros_like(self.taken, device=valid.device)
            self.num_tokens = torch.zeros_like(self.num_tokens, device=valid.device)
        self.taken.copy_(taken.sum(dim=0))
        self.num_tokens.copy_(valid.sum())


class ModalityExperts(nn.Module):
    """New experts of each modality, and their routers.

    Args:
        experts: feed-forwards, ``d -> d``, by modality.
        routers: the routers, under the same names.
        auxiliary_loss_weight: what the loss of the auxiliary routers is multiplied by, relative to the
            main loss.

    Attributes:
        auxiliary_loss_scale: what it is multiplied by too if the main loss is not marked (see
            ``torchfuse.modules.experts.auxiliary_loss``).
    """

    def __init__(
        self,
        experts: Mapping[str, Sequence[nn.Module]],
        routers: Mapping[str, ExpertChoiceRouter],
        auxiliary_loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({name: nn.ModuleList(group) for name, group in experts.items()})
        self.routers = nn.ModuleDict(routers)
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.auxiliary_loss_scale = 1.0

    @property
    def depends_on_batch(self) -> bool:
        """Whether the choice of a token depends on the rest of the batch in evaluation too."""
        return any(self.router(name).depends_on_batch for name in self.routers)

    def router(self, name: str) -> ExpertChoiceRouter:
        """Return the router of a modality."""
        router = self.routers[name]
        assert isinstance(router, ExpertChoiceRouter)
        return router

    def forward(self, name: str, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the experts' output for a modality's tokens; zero for a token that none of them took.

        In evaluation with auxiliary routers every expert runs on every token, and what it did not take
        is multiplied by zero: as costly as that many feed-forwards, and exact for any batch.

        Args:
            name: a modality.
            x: its tokens, ``[b, s, d]``.
            valid: which of them count, bool ``[b, s]``. None: all.

        Returns:
            ``[b, s, d]``.
        """
        y, loss = self._run(name, x, valid)
        if loss is None:
            return y
        return add_loss(y, loss, self.auxiliary_loss_weight, self.auxiliary_loss_scale)

    def keep_in_graph(self, name: str, stand_in: Tensor, y: Tensor) -> Tensor:
        """Return ``y`` bit-identical, as a function of a modality's weights with a zero gradient."""
        output, loss = self._run(name, stand_in, None, stand_in=True)
        return keep_in_graph(y, output.sum() if loss is None else output.sum() + loss)

    def _run(
        self, name: str, x: Tensor, valid: Tensor | None, *, stand_in: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        tokens = x.flatten(0, 1)  # [b * s, d]: experts choose over the whole batch
        if valid is not None:
            valid = valid.flatten()
            tokens = torch.where(valid.unsqueeze(-1), tokens, 0)
        dispatch = self.router(name)(tokens, valid, stand_in=stand_in)
        experts = self.experts[name]
        assert isinstance(experts, nn.ModuleList)
        return dispatch.combine(tokens, experts).view_as(x), dispatch.loss


def _prediction_loss(predicted: Tensor, taken: Tensor, valid: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of predictions against choices, over valid tokens."""
    each = F.binary_cross_entropy_with_logits(predicted, taken.to(predicted.dtype), reduction="none")
    counted = torch.where(valid.unsqueeze(-1), each, 0).sum()
    return counted / (valid.sum() * predicted.shape[-1]).clamp(min=1)
