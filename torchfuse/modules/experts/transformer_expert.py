"""The weights of one modality in a transformer layer, copied from a pretrained layer.

They have the pretrained layer's shapes, and start from its values. Low-rank adapters and quantization
of the pretrained layer are not copied: an expert's maps are plain and trainable.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.naming import canonical_name, unwrap
from torchfuse.params import adapter_ids

__all__ = [
    "LAST_MAPS",
    "ExpertAttention",
    "TransformerExpert",
    "are_equal",
    "copy_of",
    "expert_like",
    "first_values",
]

# The last maps of each residual: at zero, hidden states pass through the layer unchanged.
LAST_MAPS: Final = ("attn.output_proj.", "mlp.w2.")


class ExpertAttention(nn.Module):
    """A modality's maps into the attention that all modalities share, and out of it.

    Args:
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values.
        head_dim: width of a head.
        k_proj: ``d -> num_kv_heads * head_dim``.
        v_proj: ``d -> num_kv_heads * head_dim``.
        q_proj: ``d -> num_heads * head_dim``; None with ``output_proj``: keys and values only.
        output_proj: ``num_heads * head_dim -> d``.
        q_norm: norm over ``head_dim`` of each query.
        k_norm: norm over ``head_dim`` of each key.

    Raises:
        ModelError: if only one of ``q_proj`` and ``output_proj`` is given.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_proj: nn.Module,
        v_proj: nn.Module,
        q_proj: nn.Module | None = None,
        output_proj: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if (q_proj is None) != (output_proj is None):
            raise ModelError("q_proj and output_proj are given together or not at all.")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.q_norm = q_norm
        self.k_norm = k_norm


class TransformerExpert(nn.Module):
    """One modality's weights of a transformer layer; children are named as in torchtune's layers.

    Args:
        attn: its maps of the shared attention.
        sa_norm: norm before attention.
        mlp: feed-forward, ``d -> d``; None with ``mlp_norm``: keys and values only.
        mlp_norm: norm before the feed-forward.
        sa_scale: scales what attention adds.
        mlp_scale: scales what the feed-forward adds.

    Raises:
        ModelError: if some parts are those of a whole layer and others are not.
    """

    def __init__(
        self,
        attn: ExpertAttention,
        *,
        sa_norm: nn.Module,
        mlp: nn.Module | None = None,
        mlp_norm: nn.Module | None = None,
        sa_scale: nn.Module | None = None,
        mlp_scale: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if len({part is None for part in (attn.q_proj, mlp, mlp_norm)}) > 1:
            raise ModelError(
                "An expert has queries, mlp and mlp_norm, or none of them: keys and values only."
            )
        self.attn = attn
        self.mlp = mlp
        self.sa_norm = sa_norm
        self.mlp_norm = mlp_norm
        self.sa_scale = sa_scale
        self.mlp_scale = mlp_scale

    @property
    def keys_and_values_only(self) -> bool:
        """Whether this modality is only attended to, and its own hidden states stay as they are."""
        return self.mlp is None


def expert_like(layer: Any, keys_and_values_only: bool) -> TransformerExpert:
    """Return an expert with the shapes of a pretrained layer, without values."""
    attn = layer.attn
    maps, parts = ["k_proj", "v_proj", "k_norm"], ["sa_norm"]
    if not keys_and_values_only:
        maps += ["q_proj", "output_proj", "q_norm"]
        parts += ["mlp", "mlp_norm", "sa_scale", "mlp_scale"]
    copies: dict[str, Any] = {
        name: copy_of(pretrained)
        for name in maps
        if (pretrained := getattr(attn, name)) is not None  # norms may be absent
    }
    shared = ExpertAttention(
        num_heads=attn.num_heads,
        num_kv_heads=attn.num_kv_heads,
        head_dim=attn.head_dim,
        **copies,
    )
    whole: dict[str, Any] = {name: copy_of(getattr(layer, name)) for name in parts}
    return TransformerExpert(shared, **whole).train(layer.training)


def copy_of(module: nn.Module) -> nn.Module:
    """Return a trainable copy in which each layer with a matrix is an ``nn.Linear`` without values."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            memo[id(part)] = nn.utils.skip_init(
                nn.Linear,
                weight.shape[1],
                weight.shape[0],
                bias=getattr(part, "bias", None) is not None,
                dtype=weight.dtype,
                device=weight.device,
            )
    return copy.deepcopy(module, memo).requires_grad_(True)


def first_values(
    pretrained: nn.Module, expert: nn.Module, zeros: tuple[str, ...]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield each parameter of an expert and its first values."""
    named = unwrap(pretrained).named_parameters(remove_duplicate=False)
    source: dict[str, Any] = {canonical_name(name): parameter for name, parameter in named}
    adapted = adapter_ids(expert)  # LoRA parameters are not copies
    for name, parameter in expert.named_parameters():
        if id(parameter) in adapted:
            continue
        value = source[canonical_name(name)]
        if name.startswith(zeros):
            value = torch.zeros_like(parameter)
        elif hasattr(value, "get_original_weight"):  # NF4
            value = value.get_original_weight()
        yield parameter, value.detach()


def are_equal(pairs: Iterator[tuple[nn.Parameter, Tensor]]) -> bool:
    """Whether each parameter has its values; False if one has no memory."""
    return all(
        not parameter.is_meta and not value.is_meta and torch.equal(parameter, value.to(parameter))
        for parameter, value in pairs
    )
