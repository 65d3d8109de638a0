"""New experts of a decoder layer, made from its feed-forward."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.errors import ModelError
from torchfuse.modules.experts.expert_choice import ExpertChoiceRouter, ModalityExperts
from torchfuse.modules.experts.options import ExpertOptions
from torchfuse.params import quantized_dtype

__all__ = ["TEXT", "build_experts"]

TEXT: Final = "text"
_PARTS: Final = ("sa_norm", "attn", "sa_scale", "mlp_norm", "mlp", "mlp_scale")


def build_experts(
    layer: nn.Module, modalities: Sequence[str], options: ExpertOptions
) -> ModalityExperts:
    """Build the experts of each modality for a layer's feed-forward.

    Args:
        layer: a decoder layer as torchtune's, without wrappers.
        modalities: names of the modalities other than text.
        options: how many experts there are, and how they choose.

    Raises:
        ModelError: naming everything that does not fit.
    """
    problems = [*_problems_of_names(modalities, options), *_problems_of_layer(layer, options)]
    if problems:
        raise ModelError(f"{type(layer).__name__} cannot get experts: {'; '.join(problems)}.")
    mlp: Any = layer.mlp
    like, counts = mlp.w2.weight, {}  # new experts, and by how many a modality's tokens are shared
    if options.num_text_experts > 1:
        counts[TEXT] = (options.num_text_experts - 1, options.num_text_experts)
    for name in modalities:
        given = options.num_experts
        number = given[name] if isinstance(given, Mapping) else given
        counts[name] = (number, number)
    dim = like.shape[0]
    experts, routers = {}, {}
    for name, (number, share) in counts.items():
        zero = name == TEXT or options.start == "zero"
        experts[name] = [_new_expert(mlp, zero=zero) for _ in range(number)]
        with like.device:
            router = ExpertChoiceRouter(
                dim,
                number,
                capacity=_fraction(options.capacity) if options.capacity else Fraction(1, share),
                noise=options.noise,
                auxiliary_dim=(options.auxiliary_dim or dim) if options.auxiliary_router else None,
            )
        routers[name] = router.to(like.dtype)
    return ModalityExperts(experts, routers, options.auxiliary_loss_weight)


def _problems_of_names(modalities: Sequence[str], options: ExpertOptions) -> list[str]:
    problems = []
    if not modalities and options.num_text_experts == 1:
        problems.append("there is no modality beside text, and no new expert of text")
    bad = [
        name
        for name in modalities
        if not name or "." in name or name == TEXT or hasattr(nn.ModuleDict, name)
    ]
    if bad or len(set(modalities)) < len(modalities):
        problems.append(
            f"names of modalities become parts of parameter names: each once, not empty, not {TEXT!r}, "
            f"without a dot and no method of nn.ModuleDict; got {list(modalities)}"
        )
    if isinstance(options.num_experts, Mapping) and set(options.num_experts) != set(modalities):
        problems.append(
            f"num_experts must have the names of the modalities, {', '.join(modalities)}; got "
            f"{', '.join(options.num_experts) or 'none'}"
        )
    return problems


def _problems_of_layer(layer: nn.Module, options: ExpertOptions) -> list[str]:
    missing = [name for name in _PARTS if not isinstance(getattr(layer, name, None), nn.Module)]
    if missing:
        return [f"it lacks {', '.join(missing)}, which torchtune's decoder layers have"]
    mlp: Any = layer.mlp
    parameters = list(mlp.parameters())
    if any(quantized_dtype(p) for p in parameters):
        return [
            "its feed-forward is quantized and cannot be copied to be trained; quantize after fusing"
        ]
    output: Any = getattr(mlp, "w2", None)
    if not parameters or not isinstance(getattr(output, "weight", None), Tensor):
        return ["its mlp must be a feed-forward whose last projection is w2, as torchtune's are"]
    unknown = sorted({name for name, _ in output.named_parameters()} - {"weight", "bias"})
    if unknown and (options.start == "zero" or options.num_text_experts > 1):
        return [f"w2 of its mlp must be linear to begin at zero, and has {', '.join(unknown)}"]
    return []


def _fraction(capacity: float) -> Fraction:
    # The decimal number, not the nearest binary one, so that 0.07 of 100 tokens are 7 and not 8.
    return Fraction(capacity).limit_denominator(1_000_000)


def _new_expert(mlp: nn.Module, *, zero: bool) -> nn.Module:
    expert: Any = copy.deepcopy(mlp).requires_grad_(True)
    if zero:
        with torch.no_grad():
            for parameter in expert.w2.parameters():
                parameter.zero_()
    return expert
