"""Deep fusion: layers inside the decoder attend to the encoder's features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.base import FusedModel
from torchfuse.models.documents import check_documents
from torchfuse.models.strategies.fused_layers import fuse_layers, layers_to_fuse
from torchfuse.models.strategy import (
    ModalityStrategy,
    check_rows,
    register_modality_strategy,
)
from torchfuse.models.types import (
    CacheState,
    EncoderFeatures,
    EncoderInput,
    ModalityContext,
    OnMissing,
    StrategyModel,
)
from torchfuse.modules.fusion_layer import FusionLayer
from torchfuse.naming import unwrap

__all__ = ["CrossAttentionStrategy", "DeepFusionModel"]

_EVERY: Final = 4


class DeepFusionModel(FusedModel):
    """A decoder whose layers attend to the encoder's features.

    Signature and methods are torchtune 0.6.1's. Beyond it there are several encoders, an adapter,
    ``encode()`` and ``encoder_embeds=``, stand-ins for batches without images, and everything that a
    ``TransformerDecoder`` has. ``torchfuse.fuse`` builds one from a plain decoder.

    Args:
        decoder: a ``TransformerDecoder`` with fusion layers in it.
        encoder: a module that returns features ``[b, n, d_e]``, or several by name.
        decoder_trainable: whether the pretrained decoder trains.
        encoder_trainable: whether the encoder trains; also ``{name: bool}``.
        fusion_trainable: whether fusion parameters train.
        adapter: maps features to the decoder's width. None: the encoder does.
        on_missing: see ``FusedModel``.
        example_input: see ``FusedModel``.
        strategy: options of the architecture, for descriptions; ``fuse`` passes them.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module | Mapping[str, nn.Module],
        *,
        decoder_trainable: bool = False,
        encoder_trainable: bool | Mapping[str, bool] = False,
        fusion_trainable: bool = True,
        adapter: nn.Module | Mapping[str, nn.Module] | None = None,
        on_missing: OnMissing = "skip",
        example_input: EncoderInput | None = None,
        strategy: CrossAttentionStrategy | None = None,
    ) -> None:
        super().__init__(
            decoder,
            encoder,
            strategy=strategy or CrossAttentionStrategy(),
            adapter=adapter,
            decoder_trainable=decoder_trainable,
            encoder_trainable=encoder_trainable,
            fusion_trainable=fusion_trainable,
            on_missing=on_missing,
            example_input=example_input,
        )


@register_modality_strategy("cross_attention")
@dataclass(frozen=True)
class CrossAttentionStrategy(ModalityStrategy):
    """Gated cross-attention layers at every k-th decoder layer attend to the features (Flamingo).

    The sequence itself holds text only. Sizes that are None are those of the decoder layer.

    Args:
        layers: indices of the decoder layers to fuse. None: every k-th, by the ``every`` of ``fuse``,
            which is 4 unless given.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        hidden_dim: width inside the feed-forward.
        qk_norm: whether queries and keys are normalised per head.
        norm_eps: epsilon of the RMS norms.
        attn_dropout: probability of dropping an attention weight in training.
        fusion_first: whether a cross-attention layer runs before its decoder layer.
    """

    caches_features = True
    takes_documents = True
    model_class = DeepFusionModel

    layers: Sequence[int] | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    qk_norm: bool = True
    norm_eps: float = 1e-5
    attn_dropout: float = 0.0
    fusion_first: bool = True

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("num_heads", "num_kv_heads", "hidden_dim")}
        problems = [
            f"{name}={size} must be at least 1"
            for name, size in sizes.items()
            if size is not None and size < 1
        ]
        if not 0 <= self.attn_dropout < 1:
            problems.append(f"attn_dropout={self.attn_dropout} must lie in [0, 1)")
        if not 0 < self.norm_eps < float("inf"):
            problems.append(f"norm_eps={self.norm_eps} must be a finite number greater than 0")
        if problems:
            raise ConfigError(f"cross_attention: {'; '.join(problems)}.")

    def plan(
        self, decoder: nn.Module, encoders: Sequence[str], *, every: int | None
    ) -> Callable[[], None]:
        layers: Any = decoder.layers
        indices = layers_to_fuse(len(layers), self.layers, every, default=_EVERY)
        return fuse_layers(
            layers, indices, lambda i: self._fuse_layer(layers[i], decoder.tok_embeddings)
        )

    def _fuse_layer(self, layer: Any, embedding: Any) -> FusionLayer:
        from torchfuse.models.layers import cross_attention_layer  # imports torchtune

        try:
            attn, hidden_dim = layer.attn, layer.mlp.w1.weight.shape[0]
            num_heads, num_kv_heads, head_dim = attn.num_heads, attn.num_kv_heads, attn.head_dim
        except AttributeError as error:
            raise ModelError(
                f"It is a {type(layer).__name__}, which lacks what torchtune's decoder layers have "
                f"({error}). Wrap such layers in FusionLayer and pass the decoder to DeepFusionModel."
            ) from error
        weight = next(p for p in layer.parameters() if p.is_floating_point())
        if self.num_heads is not None:
            width = num_heads * head_dim
            if width % self.num_heads:
                raise ConfigError(f"num_heads={self.num_heads} must divide the attention width {width}.")
            num_heads, head_dim = self.num_heads, width // self.num_heads
        with weight.device:
            new = cross_attention_layer(
                embed_dim=embedding.embedding_dim,
                num_heads=num_heads,
                num_kv_heads=self.num_kv_heads or num_kv_heads,
                head_dim=head_dim,
                hidden_dim=self.hidden_dim or hidden_dim,
                norm_eps=self.norm_eps,
                qk_norm=self.qk_norm,
                attn_dropout=self.attn_dropout,
            )
        return FusionLayer(layer, new.to(weight.dtype), fusion_first=self.fusion_first)

    def describe(self, decoder: nn.Module) -> dict[str, Any]:
        layers: Any = decoder.layers
        indices = [i for i, layer in enumerate(layers) if isinstance(unwrap(layer), FusionLayer)]
        described = [_describe_layer(unwrap(layers[index])) for index in indices]
        if not described or any(options != described[0] for options in described):
            raise ModelError(
                "cross_attention: fused layers with different options cannot be described by one set "
                f"of options: {described}."
            )
        return {"layers": indices, **described[0]}

    def prepare(
        self,
        model: StrategyModel,
        tokens: Tensor,
        features: Mapping[str, EncoderFeatures],
        *,
        mask: Tensor | None,
        encoder_mask: Tensor | Mapping[str, Tensor] | None,
        input_pos: Tensor | None,
        document_ids: Tensor | None = None,
    ) -> ModalityContext:
        cached = model.caches_are_enabled()
        if not features:
            step_mask = self._mask_of_cached(model, tokens, encoder_mask) if cached else None
            return ModalityContext(tokens, mask=mask, input_pos=input_pos, encoder_mask=step_mask)
        check_rows(tokens, features)
        if document_ids is not None:
            check_documents(features)
        joined = _join_masks(tokens, features, always=cached)
        state = None
        if joined is not None and cached:
            joined = _pad_to_slots(joined, model)
            state = CacheState(encoder_mask=joined[:, -1:])
        return ModalityContext(
            tokens,
            mask=mask,
            input_pos=input_pos,
            encoder_input=torch.cat(
                [f.embeds.expand(tokens.shape[0], -1, -1) for f in features.values()], dim=1
            ),
            encoder_mask=joined,
            cache_state=state,
        )

    def _mask_of_cached(
        self, model: StrategyModel, tokens: Tensor, encoder_mask: Tensor | Mapping[str, Tensor] | None
    ) -> Tensor | None:
        """Which cached features each token may attend to, ``[b, s, slots]``."""
        if encoder_mask is None:
            last = None if model.cache_state is None else model.cache_state.encoder_mask
            return None if last is None else last.expand(-1, tokens.shape[1], -1)
        if isinstance(encoder_mask, Mapping):
            given = [encoder_mask.get(name) for name in model.encoder_names]
            masks = [mask for mask in given if mask is not None]
            if len(masks) < len(given):
                raise ModelError(
                    "Once features are cached, an encoder_mask by name must hold a tensor for each of "
                    f"{', '.join(model.encoder_names)}; without an encoder_mask, new tokens attend to "
                    "the features that the last token attended to."
                )
            encoder_mask = torch.cat([_by_token(mask, tokens) for mask in masks], dim=-1)
        shapes = ([*tokens.shape], [1, tokens.shape[1]], [tokens.shape[0]])
        if encoder_mask.dtype != torch.bool or list(encoder_mask.shape[:-1]) not in shapes:
            raise ModelError(
                f"encoder_mask must be bool (True: may attend) with shape {[*tokens.shape, 'n']} or "
                f"{[tokens.shape[0], 'n']}, got {encoder_mask.dtype} {list(encoder_mask.shape)}."
            )
        return _pad_to_slots(_by_token(encoder_mask, tokens), model)


def _describe_layer(layer: Any) -> dict[str, Any]:
    """Read the options of a fused layer from its modules."""
    fusion = layer.fusion_layer
    try:
        norms = [fusion.ca_norm, fusion.mlp_norm, *_given(fusion.attn.q_norm, fusion.attn.k_norm)]
        eps = {norm.eps for norm in norms}
        options = {
            "num_heads": fusion.attn.num_heads,
            "num_kv_heads": fusion.attn.num_kv_heads,
            "hidden_dim": fusion.mlp.w1.weight.shape[0],
            "qk_norm": fusion.attn.q_norm is not None,
            "norm_eps": next(iter(eps)),
            "attn_dropout": fusion.attn.attn_dropout,
            "fusion_first": layer.fusion_first,
        }
    except AttributeError as error:
        raise ModelError(
            f"cross_attention: a {type(fusion).__name__} is no cross-attention layer: {error}."
        ) from error
    if len(eps) > 1:
        raise ModelError(f"cross_attention: norms of one layer differ in epsilon, {sorted(eps)}.")
    return options


def _given(*modules: Any) -> list[Any]:
    return [module for module in modules if module is not None]


def _join_masks(
    tokens: Tensor, features: Mapping[str, EncoderFeatures], *, always: bool
) -> Tensor | None:
    """Join the masks of all encoders to ``[b, s, n]``; a stand-in is masked out."""
    if not always and all(f.present and f.mask is None for f in features.values()):
        return None
    joined = []
    for given in features.values():
        shape = (*tokens.shape, given.embeds.shape[1])
        if not given.present:
            joined.append(torch.zeros(shape, dtype=torch.bool, device=tokens.device))
        elif given.mask is None:
            joined.append(torch.ones(shape, dtype=torch.bool, device=tokens.device))
        else:
            joined.append(_by_token(given.mask, tokens))
    return torch.cat(joined, dim=-1)


def _pad_to_slots(mask: Tensor, model: StrategyModel) -> Tensor:
    """Widen a mask to the cache: slots after the features are masked out."""
    slots = model.encoder_max_cache_seq_len or model.max_seq_len
    if mask.shape[-1] > slots:  # raised before any layer has written to its cache
        raise ModelError(
            f"The encoder cache holds up to {slots} encoder tokens, got {mask.shape[-1]}. Set up the "
            f"caches with encoder_max_seq_len of at least {mask.shape[-1]}."
        )
    return F.pad(mask, (0, slots - mask.shape[-1]))


def _by_token(mask: Tensor, tokens: Tensor) -> Tensor:
    """Expand a mask ``[b, s, n]`` or ``[b, n]`` to ``[b, s, n]``."""
    return (mask if mask.dim() == 3 else mask[:, None]).expand(*tokens.shape, -1)
