"""Mixture-of-Transformers: each modality has its own weights, and attention is over all tokens.

Algorithm 1 of Liang et al. (https://arxiv.org/abs/2411.04996): norms, projections and feed-forward of a
layer are chosen token by token by modality; attention is over the whole sequence. Here the pretrained
layer has the text's weights, under its own names, and every other modality has new weights, so that text
alone runs through the pretrained layer itself.

After the last layer of a model the hidden states of modalities in front of the text are not used. There
only keys and values of them matter, and other weights would never get a gradient:
``keys_and_values_only``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.experts.routing import Routing, keep_in_graph
from torchfuse.modules.experts.transformer_expert import (
    LAST_MAPS,
    TransformerExpert,
    are_equal,
    copy_of,
    expert_like,
    first_values,
)
from torchfuse.modules.fusion_wrapper import FusionWrapper
from torchfuse.modules.grouped_attention import grouped_attention
from torchfuse.naming import unwrap

__all__ = ["MoTLayer", "MoTNorm", "Start"]

Start = Literal["warm", "zero"]


class _Experts(FusionWrapper):
    """A pretrained module for text, and one like it for each other modality."""

    fusion_layer: nn.ModuleDict
    start: Start = "warm"

    @torch.no_grad()
    def reset_experts(self) -> None:
        """Give the experts their first values, from the pretrained weights as they are now.

        ``start="warm"`` copies them all. ``start="zero"`` does too, except that the last map of
        attention and of feed-forward is zero: the other modalities pass through a layer unchanged, and
        text attends to them as before.
        """
        for parameter, value in self._first_values():
            parameter.copy_(value)

    @torch.no_grad()
    def experts_are_fresh(self) -> bool:
        """Whether all experts are as ``reset_experts`` would set them; False if one has no memory."""
        return are_equal(self._first_values())

    def _first_values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for expert in self.fusion_layer.values():
            yield from first_values(self.wrapped, expert, LAST_MAPS if self.start == "zero" else ())


class MoTLayer(_Experts):
    """A pretrained decoder layer for text, with new weights for each other modality.

    Names of the pretrained layer are its own here too (see ``torchfuse.naming.TransparentWrapper``);
    the new weights are under ``fusion_layer.<modality>.`` and are what ``fusion_params`` names.

    Args:
        layer: the pretrained layer, with the children of torchtune's ``TransformerSelfAttentionLayer``
            and ``MultiHeadAttention``. Its rotary embedding, caches and dropout serve all modalities.
        experts: the other modalities' weights, by name.
        start: the experts' first values: ``"warm"`` or ``"zero"``, as in ``reset_experts``.

    Raises:
        ModelError: if heads of a modality differ from the layer's, some experts are keys and values
            only and others are not, or a name of the layer would be hidden.
    """

    layer: Any

    def __init__(
        self, layer: nn.Module, experts: Mapping[str, TransformerExpert], *, start: Start = "warm"
    ) -> None:
        super().__init__()
        _check_experts(unwrap(layer), experts)
        self.start = start
        self.keys_and_values_only = any(e.keys_and_values_only for e in experts.values())
        self.fusion_layer = nn.ModuleDict(experts)
        self.wrap(layer, child="layer")

    @classmethod
    def from_pretrained(
        cls,
        layer: nn.Module,
        names: Sequence[str],
        *,
        start: Start = "warm",
        keys_and_values_only: bool = False,
    ) -> MoTLayer:
        """Add an expert of each modality to a pretrained layer, which keeps its parameters.

        Args:
            layer: as for the class.
            names: the modalities.
            start: the experts' first values, as in ``reset_experts``.
            keys_and_values_only: whether the hidden states of the modalities are not used after this
                layer.

        Raises:
            ConfigError: for an unknown ``start``.
            ModelError: as the class, or if ``start="zero"`` and the feed-forward has no ``w2``.
        """
        _check_start(start, unwrap(layer))
        experts = {name: expert_like(unwrap(layer), keys_and_values_only) for name in names}
        fused = cls(layer, experts, start=start)
        fused.reset_experts()
        return fused

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer, each token through its modality's weights.

        Args:
            x: hidden states, ``[b, t, d]``.
            mask: bool ``[b, t, t]`` (``[b, t, slots]`` with a cache), True: may attend. None: causal.
            input_pos: positions, ``[b, t]`` or ``[t]``. None: ``0 .. t - 1``.
            routing: the modality of each token. None: all are text, and the pretrained layer is called
                as it is.
            **kwargs: passed to the pretrained layer where it is called.

        Returns:
            Hidden states, ``[b, t, d]``.

        Raises:
            ModelError: if modalities alternate, but the experts are keys and values only; if the
                pretrained layer is sharded as a module of its own.
        """
        self.refuse_sharded()
        if routing is None:
            return self.wrapped(x, mask=mask, input_pos=input_pos, **kwargs)
        if not routing.slots:
            x = self.wrapped(x, mask=mask, input_pos=input_pos, **kwargs)
            return self._keep_in_graph(x, routing.stand_ins)
        if self.keys_and_values_only and routing.places is not None:
            raise ModelError(
                "The experts of this layer are keys and values only, which is for modalities in front "
                "of the text: where they alternate, the hidden states of all are used."
            )
        # Activation checkpointing around the pretrained layer alone is meant for all that runs here.
        checkpoint = getattr(self.wrapped, "checkpoint_fn", None)
        if checkpoint is not None:
            return checkpoint(self._mix, x, mask, input_pos, routing)
        return self._mix(x, mask, input_pos, routing)

    def _mix(self, x: Tensor, mask: Tensor | None, input_pos: Tensor | None, routing: Routing) -> Tensor:
        """Run algorithm 1, then the stand-ins of modalities that the batch lacks."""
        b, t, _ = x.shape
        at = torch.arange(t, device=x.device) if input_pos is None else input_pos
        at = at.view(-1, t).expand(b, -1)[:, :, None]
        text, parts = routing.text(x), {name: routing.take(name, x) for name in routing.slots}
        experts = {name: self.fusion_layer[name] for name in parts}
        queries, keys, values = self._project(self.wrapped, text, routing.text(at))
        projected = {n: self._project(experts[n], parts[n], routing.take(n, at)) for n in parts}
        keys = routing.merge(keys, {name: k for name, (_, k, _) in projected.items()})
        values = routing.merge(values, {name: v for name, (_, _, v) in projected.items()})
        if self.keys_and_values_only:
            text = _finish(self.wrapped, text, self._attend(queries, keys, values, mask))
            return self._keep_in_graph(routing.merge(text, parts), routing.stand_ins)
        queries = routing.merge(queries, {name: q for name, (q, _, _) in projected.items()})
        attended = self._attend(queries, keys, values, mask)
        parts = {n: _finish(experts[n], parts[n], routing.take(n, attended)) for n in parts}
        text = _finish(self.wrapped, text, routing.text(attended))
        return self._keep_in_graph(routing.merge(text, parts), routing.stand_ins)

    def _project(self, part: Any, x: Tensor, at: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return queries (None without the map), keys, values, ``[b, s, heads * head_dim]``, rotated."""
        attn, h = part.attn, part.sa_norm(x)
        q = None if attn.q_proj is None else self._heads(attn.q_proj(h), attn.q_norm, at)
        return q, self._heads(attn.k_proj(h), attn.k_norm, at), attn.v_proj(h)

    def _heads(self, x: Tensor, norm: Callable[[Tensor], Tensor] | None, at: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.attn.head_dim))
        if self.attn.pos_embeddings is not None:
            x = self.attn.pos_embeddings(x, input_pos=at.squeeze(-1))
        return (x if norm is None else norm(x)).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from the last tokens to all, ``[b, s, heads * head_dim]``."""
        attn = self.attn
        q, k, v = (x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for x in (q, k, v))
        s, t = q.shape[2], k.shape[2]
        dropout = attn.attn_dropout if attn.training else 0.0
        if mask is not None and mask.shape[1] > s:
            mask = mask[:, -s:]
        if attn.kv_cache is not None and attn.cache_enabled:
            k, v = attn.kv_cache.update(k, v)
        elif mask is None and attn.is_causal:
            if s == t:
                shared = q.shape[1] != k.shape[1]
                attended = F.scaled_dot_product_attention(
                    q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared
                )
                return attended.transpose(1, 2).flatten(2)
            mask = torch.ones(1, s, t, dtype=torch.bool, device=q.device).tril(t - s)
        return grouped_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)

    def _keep_in_graph(self, x: Tensor, stand_ins: Mapping[str, Tensor]) -> Tensor:
        """Return ``x`` as a function of every weight of experts that the batch does not need, too."""
        for name, features in stand_ins.items():
            expert, h = self.fusion_layer[name], features.to(x.dtype)
            at = torch.arange(h.shape[1], device=h.device)[None, :, None]
            q, k, v = self._project(expert, h, at)
            total = k.sum() + v.sum()
            x = keep_in_graph(x, total if q is None else total + _finish(expert, h, q).sum())
        return x


class MoTNorm(_Experts):
    """The final norm of a model: the pretrained one for text, and a new one for each modality.

    Only needed where a modality's hidden states are scored, that is, between tokens of text.

    Args:
        norm: the pretrained norm.
        names: the modalities.

    Raises:
        ModelError: if a name of the norm would be hidden.

    Examples:
        >>> norm = MoTNorm(nn.LayerNorm(3), ["image"])
        >>> list(norm.state_dict())
        ['weight', 'bias', 'fusion_layer.image.weight', 'fusion_layer.image.bias']
    """

    norm: Any

    def __init__(self, norm: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.fusion_layer = nn.ModuleDict({name: copy_of(unwrap(norm)) for name in names})
        self.wrap(norm, child="norm")

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        """Normalise each token by its modality's norm.

        Args:
            x: hidden states, ``[b, t, d]``.
            routing: the modality of each token. None: all are text.
        """
        if routing is None:
            return self.wrapped(x)
        parts = {name: self.fusion_layer[name](routing.take(name, x)) for name in routing.slots}
        x = routing.merge(self.wrapped(routing.text(x)), parts)
        for name, stand_in in routing.stand_ins.items():
            x = keep_in_graph(x, self.fusion_layer[name](stand_in.to(x.dtype)))
        return x


def _finish(part: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Run the part of a layer after attention: ``[b, s, d]``."""
    x = x + _scaled(part.sa_scale, part.attn.output_proj(attended))
    return x + _scaled(part.mlp_scale, part.mlp(part.mlp_norm(x)))


def _scaled(scale: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    return x if scale is None else scale(x)


def _check_experts(layer: Any, experts: Mapping[str, TransformerExpert]) -> None:
    def heads(attn: Any) -> tuple[int, int, int]:
        return attn.num_heads, attn.num_kv_heads, attn.head_dim

    problems = [
        f"{name!r} has {', '.join(map(str, heads(expert.attn)))}"
        for name, expert in experts.items()
        if heads(expert.attn) != heads(layer.attn)
    ]
    if problems:
        wanted = ", ".join(map(str, heads(layer.attn)))
        raise ModelError(
            "Modalities attend together, so each must have the pretrained layer's heads of queries, "
            f"heads of keys and values, and width of a head, {wanted}; {'; '.join(problems)}."
        )
    if len({expert.keys_and_values_only for expert in experts.values()}) > 1:
        only = [name for name, expert in experts.items() if expert.keys_and_values_only]
        raise ModelError(
            f"Experts are keys and values only, or none is; here only {', '.join(map(repr, only))}."
        )


def _check_start(start: str, layer: nn.Module) -> None:
    if start not in ("warm", "zero"):
        raise ConfigError(f'start must be "warm" or "zero", got {start!r}.')
    if start == "zero" and not hasattr(getattr(layer, "mlp", None), "w2"):
        raise ModelError(
            'start="zero" needs a feed-forward whose last map is w2, as torchtune\'s; got a '
            f'{type(getattr(layer, "mlp", None)).__name__}. Use start="warm".'
        )
