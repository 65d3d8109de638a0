"""The loss of next-token prediction without the logits of all positions.

The output head is the widest layer of a model, and most positions of multimodal data are not supervised:
questions, images, padding. Here hidden states are gathered at supervised positions, and head and
cross-entropy run on a few of them at a time. Each chunk's gradients are computed together with its
loss, so that neither logits nor anything of their size is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torchfuse.errors import ModelError
from torchfuse.modules.experts.auxiliary_loss import mark_main_loss
from torchfuse.naming import find_model, unwrap
from torchfuse.params.storage import is_sharded
from torchfuse.training.loss import LossOptions, next_token_loss, shifted_targets, summed_loss

__all__ = ["linear_next_token_loss"]

# Scores of a chunk, in fp32. GPUs read the head in each chunk and need more rows to hide it.
_SCORES: Final = {"cpu": 2**24, "cuda": 2**26}


def linear_next_token_loss(
    model: nn.Module,
    tokens: Tensor,
    *,
    labels: Tensor,
    ignore_index: int = -100,
    loss_weights: Tensor | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    **forward: Any,
) -> tuple[Tensor, Tensor]:
    """Run a model and return its ``next_token_loss``, with the head on supervised positions alone.

    Equal to ``next_token_loss(model(tokens, **forward), labels)``, in less time and memory. Gradients
    of gradients cannot be computed through it.

    Args:
        model: a fused model or a decoder, also compiled, sharded or in DDP. One without torchtune's
            ``output`` and ``chunked_output`` computes the logits of all positions.
        tokens: ids, ``[b, s]``.
        labels: see ``next_token_loss``, as for the next four.
        ignore_index: the label that does not count.
        loss_weights: factors of the labels' losses, ``[b, s]``.
        z_loss: factor of the squared logarithm of each softmax's denominator.
        label_smoothing: between 0 and 1.
        **forward: the model's other arguments, such as ``encoder_input``.

    Returns:
        The sum, and the number of labels in it, or the sum of their weights.

    Raises:
        ModelError: if labels or weights have another shape than the tokens; in a backward pass with
            ``create_graph=True``.

    Examples:
        >>> from torchfuse.models.decoders.llama import llama_decoder
        >>> sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 16}
        >>> model = llama_decoder(vocab_size=11, num_layers=2, max_seq_len=16, **sizes)
        >>> tokens = torch.tensor([[3, 1, 4, 1, 5]])
        >>> labels = torch.tensor([[-100, -100, -100, 1, 5]])
        >>> total, count = linear_next_token_loss(model, tokens, labels=labels)
        >>> expected, _ = next_token_loss(model(tokens), labels)
        >>> int(count), torch.allclose(total, expected)
        (2, True)
    """
    options = LossOptions(z_loss=z_loss, label_smoothing=label_smoothing)
    fused: Any = unwrap(find_model(model))
    decoder: Any = unwrap(getattr(fused, "decoder", fused))
    if not (hasattr(decoder, "chunked_output") and hasattr(decoder, "output")):
        logits = model(tokens, **forward)
        return next_token_loss(logits, labels, ignore_index, loss_weights=loss_weights, **options)
    targets, weights = shifted_targets(labels, tokens.shape, ignore_index, loss_weights)
    learned = targets != ignore_index
    with _without_head(decoder):
        hidden = model(tokens, **forward)
    hidden = hidden[-1] if isinstance(hidden, list) else hidden
    count = learned.sum() if weights is None else weights.sum()
    if any(map(is_sharded, _parameters(decoder.output))):
        fused.unshard()  # fully_shard(reshard_after_forward=True)
    total = _LinearLoss.apply(
        hidden[:, :-1][learned],
        targets[learned],
        None if weights is None else weights[learned],
        decoder.output,
        options,
        *_parameters(decoder.output),
    )
    return mark_main_loss(total, count), count


class _LinearLoss(torch.autograd.Function):
    """The summed loss of a head's scores; gradients are computed with it, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        head: Callable[[Tensor], Tensor],
        options: LossOptions,
        *parameters: Tensor,
    ) -> Tensor:
        hidden = hidden.detach()
        trained = [index for index, p in enumerate(parameters) if p.requires_grad]
        with_gradients = any(ctx.needs_input_grad)
        total, of_hidden = torch.zeros((), device=hidden.device), []
        if not (with_gradients or len(hidden)):
            return total
        # Heads in int8_dynamic, which have no gradient, do not take an input without rows.
        with torch.enable_grad():  # autocast may keep the cast weight, and its gradient is needed below
            vocab_size = head(hidden[: int(not with_gradients)]).shape[-1]
        rows = _rows_of_a_chunk(vocab_size, [parameters[index] for index in trained], hidden.device)
        shape = (min(rows, len(hidden)), vocab_size)
        buffer = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        sums: list[Tensor] = []  # in fp32: many small terms are added
        for start in range(0, max(1, len(hidden)), rows):
            chunk = slice(start, start + rows)
            scored = targets[chunk], None if weights is None else weights[chunk]
            if not with_gradients:
                total += summed_loss(head(hidden[chunk]).float(), *scored, **options)
                continue
            loss, of_h, *others = _loss_and_gradients(
                head, hidden[chunk], *scored, [parameters[i] for i in trained], buffer, **options
            )
            total += loss
            of_hidden.append(of_h)
            if sums:
                for into, term in zip(sums, others, strict=True):
                    into += term
            else:
                sums = [term.float() for term in others]
        if with_gradients:
            gradients = [g.to(parameters[i].dtype) for i, g in zip(trained, sums, strict=True)]
            ctx.save_for_backward(torch.cat(of_hidden), *gradients)
            ctx.trained, ctx.num_parameters = trained, len(parameters)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        if torch.is_grad_enabled():  # create_graph=True
            raise ModelError(
                "linear_next_token_loss has gradients, but not gradients of gradients: use "
                "next_token_loss(model(tokens), labels)."
            )
        # In bf16 the rounded scale would be an error of all gradients below.
        of_hidden, *gradients = ((t.float() * scale).to(t.dtype) for t in ctx.saved_tensors)
        of_parameters: list[Tensor | None] = [None] * ctx.num_parameters
        for index, gradient in zip(ctx.trained, gradients, strict=True):
            of_parameters[index] = gradient
        return of_hidden, None, None, None, None, *of_parameters


def _loss_and_gradients(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    parameters: Sequence[Tensor],
    buffer: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> list[Tensor]:
    """Return the loss of a chunk, and the gradients of its hidden states and of parameters.

    The scores' log-probabilities are written into the buffer, and their gradient in place of these:
    autograd would hold four tensors of this size, and a new one for each chunk costs time.
    """
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        scores = head(hidden.view_as(hidden))  # FlopCounterMode's hooks fail on a leaf
    edge, dtype, index = get_gradient_edge(scores), scores.dtype, targets[:, None]
    scores = scores.detach()
    at_target = scores.gather(1, index).float()  # [n, 1]
    log_p = torch.log_softmax(scores, dim=-1, dtype=torch.float32, out=buffer[: len(scores)])
    del scores
    log_p_target = log_p.gather(1, index)
    losses = (label_smoothing - 1) * log_p_target
    if label_smoothing:
        losses = losses - label_smoothing * log_p.mean(dim=-1, keepdim=True)
    gradient = log_p.exp_()
    if z_loss:
        log_z = at_target - log_p_target
        losses = losses + z_loss * log_z.square()
        gradient *= 1 + 2 * z_loss * log_z
    if label_smoothing:
        gradient -= label_smoothing / gradient.shape[-1]
    gradient.scatter_add_(1, index, torch.full_like(losses, label_smoothing - 1))
    if weights is not None:
        losses = losses * weights[:, None]
        gradient *= weights[:, None]
    wanted = [hidden, *parameters]
    gradients = torch.autograd.grad([edge], wanted, [gradient.to(dtype)], materialize_grads=True)
    return [losses.sum(), *gradients]


def _rows_of_a_chunk(vocab_size: int, trained: Sequence[Tensor], device: torch.device) -> int:
    """Return the number of positions whose scores exist at a time.

    A head that trains gets a gradient of its own size in each chunk: the scores may be as large.
    """
    scores = max(_SCORES.get(device.type, _SCORES["cuda"]), sum(p.numel() for p in trained))
    return max(1, scores // vocab_size)


@contextmanager
def _without_head(decoder: Any) -> Iterator[None]:
    """Let a decoder return its last hidden states, after the norm, as its one chunk of logits."""
    chunks, decoder.num_output_chunks = decoder.num_output_chunks, 1
    own = vars(decoder)  # torch.compile does not trace the deletion of a module's attribute
    own["chunked_output"] = _unchanged
    try:
        yield
    finally:
        decoder.num_output_chunks = chunks
        own.pop("chunked_output")


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _parameters(head: Any) -> list[Tensor]:
    """Return the parameters of a head; those of the embedding, if it is tied to one."""
    owner = head if isinstance(head, nn.Module) else head.tied_module
    return list(owner.parameters())
