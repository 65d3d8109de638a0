"""A decoder layer whose feed-forward is a group of experts for each modality.

Mixture of Modality-Aware Experts (https://arxiv.org/abs/2407.21770): attention is shared, a token is
sent to the experts of its modality, and there each expert chooses its tokens (see
``torchfuse.modules.expert_choice``). Here the layer is a pretrained one. Its attention stays as it is,
and its feed-forward becomes the first expert of text.

That expert departs from the paper, in which all experts of text choose: it takes every token of text
with weight 1, and the others choose and add to it, beginning with an output of zero. A choice would
take from most tokens the only feed-forward that the model was trained with, and what it gave the
rest would be scaled by a score. So a text keeps the pretrained logits to the bit, in training and
evaluation, until training moves them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.modules.expert_choice import ExpertChoiceRouter, ModalityExperts
from torchfuse.modules.expert_options import ExpertOptions
from torchfuse.modules.fusion_wrapper import FusionWrapper
from torchfuse.modules.routing import Routing
from torchfuse.modules.transformer_expert import are_equal, first_values
from torchfuse.naming import canonical_name, unwrap
from torchfuse.params import quantized_dtype

__all__ = ["ExpertOptions", "MoMaLayer", "expert_load"]

_TEXT: Final = "text"
_PARTS: Final = ("sa_norm", "attn", "sa_scale", "mlp_norm", "mlp", "mlp_scale")


class MoMaLayer(FusionWrapper):
    """A pretrained decoder layer with experts of each modality in place of its one feed-forward.

    ``x + attn(norm(x))`` is the pretrained layer's. What is added to that is the pretrained
    feed-forward's for text, the new experts' for other modalities, and both for text with more than one
    expert. Names are the pretrained layer's (see ``torchfuse.naming.TransparentWrapper``); new
    parameters stand under ``fusion_layer.experts.<modality>.<i>.`` and
    ``fusion_layer.routers.<modality>.`` and are what ``fusion_params`` names. Whatever else the
    pretrained layer has, its cache too, is reached here as it is there.

    Args:
        layer: a decoder layer with torchtune's parts: ``sa_norm``, ``attn``, ``sa_scale``,
            ``mlp_norm``, ``mlp`` and ``mlp_scale``. The new experts are copies of its ``mlp``.
        modalities: the names of the modalities beside text.
        options: how many experts there are, and how they choose. None: four of each, and no new one of
            text.

    Raises:
        ValueError: if the layer or a name cannot serve, or ``num_experts`` has other names.
    """

    layer: nn.Module
    fusion_layer: ModalityExperts

    def __init__(
        self, layer: nn.Module, modalities: Sequence[str], options: ExpertOptions | None = None
    ) -> None:
        super().__init__()
        options = ExpertOptions() if options is None else options
        faults = [*_faults_of_names(modalities, options), *_faults_of_layer(layer, options)]
        if faults:
            raise ValueError(f"{type(unwrap(layer)).__name__} cannot get experts: {'; '.join(faults)}.")
        self.options = options
        self.fusion_layer = _build_experts(unwrap(layer), modalities, options)
        self.wrap(layer, child="layer")

    @torch.no_grad()
    def reset_experts(self) -> None:
        """Give the experts their first values, from the pretrained feed-forward as it is now."""
        for parameter, value in self._first_values():
            parameter.copy_(value)

    @torch.no_grad()
    def experts_are_fresh(self) -> bool:
        """Whether all experts are as ``reset_experts`` would set them; False if one has no memory."""
        return are_equal(self._first_values())

    def _first_values(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        layer: Any = unwrap(self.wrapped)
        for name, group in self.fusion_layer.experts.items():
            zero = name == _TEXT or self.options.start == "zero"
            for expert in group:  # type: ignore[attr-defined]  # a ModuleList
                yield from first_values(layer.mlp, expert, ("w2.",) if zero else ())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Any = None,
        input_pos: Tensor | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: hidden states, ``[b, t, d]``.
            mask: bool ``[b, t, t]`` (``[b, t, slots]`` with a cache), True: may attend. None: causal.
            input_pos: positions, ``[b, t]`` or ``[t]``.
            routing: which tokens are of which modality. None: all are text.
            **kwargs: what the decoder hands to every layer and this one has no use for.

        Returns:
            Hidden states, ``[b, t, d]``.

        Raises:
            ValueError: if there are no experts of a modality.
        """
        if routing is not None:
            own = self.modalities
            unknown = sorted({*routing.slots, *routing.stand_ins} - {*own})
            if unknown:
                raise ValueError(
                    f"No experts of {', '.join(unknown)}: this layer was built for {', '.join(own)}."
                )
        # Activation checkpointing around the pretrained layer alone is meant for all that runs here.
        checkpoint = getattr(self.wrapped, "checkpoint_fn", None)
        if checkpoint is not None:
            return checkpoint(self._run, x, mask, input_pos, routing)
        return self._run(x, mask, input_pos, routing)

    def setup_caches(self, batch_size: int, dtype: torch.dtype, **lengths: int | None) -> None:
        """Set up the pretrained layer's key-value cache; experts keep nothing.

        Args:
            batch_size: rows of the cache.
            dtype: dtype of the cache.
            **lengths: what else the pretrained layer takes.

        Raises:
            ValueError: if the experts choose among all tokens of a batch in evaluation too.
        """
        self.check_caches()
        layer: Any = self.wrapped
        layer.setup_caches(batch_size, dtype, **lengths)

    def check_caches(self) -> None:
        """Raise a ``ValueError`` if the experts choose among all tokens of a batch in evaluation too."""
        if self.fusion_layer.looks_ahead:
            raise ValueError(
                "These experts cannot generate: each chooses its tokens among all of a batch, those to "
                "come and those of other rows too. Build them with auxiliary_router=True, and train "
                "them, so that every token is decided by itself."
            )

    @property
    def modalities(self) -> list[str]:
        """The names of the modalities beside text."""
        return [name for name in self.fusion_layer.experts if name != _TEXT]

    def _run(self, x: Tensor, mask: Any, input_pos: Tensor | None, routing: Routing | None) -> Tensor:
        layer: Any = self.wrapped
        h = layer.sa_norm(x)
        h = layer.sa_scale(layer.attn(h, h, mask=mask, input_pos=input_pos)) + x
        return h + layer.mlp_scale(self._feed_forward(layer.mlp, layer.mlp_norm(h), routing))

    def _feed_forward(self, mlp: nn.Module, x: Tensor, routing: Routing | None) -> Tensor:
        routing = Routing(slots={}) if routing is None else routing
        experts, text = self.fusion_layer, routing.text(x)
        y = mlp(text)
        if _TEXT in experts.experts:
            y = y + experts(_TEXT, text, routing.is_text(text))
        parts = {
            name: experts(name, routing.take(name, x), routing.holds_token(name))
            for name in routing.slots
        }
        if parts:
            y = routing.merge(y, parts)
        for name, stand_in in routing.stand_ins.items():
            y = experts.take_part(name, stand_in, y)
        return y


def expert_load(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """How much of its modality each new expert took when it last ran.

    The numbers stay on the device until a caller reads them, and are this rank's.

    Args:
        model: a model with ``MoMaLayer``s in it.

    Returns:
        By canonical name of the layer and by modality the share of the modality's tokens that each
        expert took, ``[E]``; zeros where there was none. The pretrained expert of text is left out: it
        takes all.

    Raises:
        ValueError: if the model has no such layer.
    """
    load = {
        canonical_name(name): {
            modality: router.taken / router.num_tokens.clamp(min=1)
            for modality in module.fusion_layer.routers
            for router in [module.fusion_layer.router(modality)]
        }
        for name, module in unwrap(model).named_modules()
        if isinstance(module, MoMaLayer)
    }
    if not load:
        raise ValueError(f"{type(unwrap(model)).__name__} has no layer with experts of modalities.")
    return load


def _faults_of_names(modalities: Sequence[str], options: ExpertOptions) -> list[str]:
    faults = []
    if not modalities and options.num_text_experts == 1:
        faults.append("there is no modality beside text, and no new expert of text")
    bad = [
        name
        for name in modalities
        if not name or "." in name or name == _TEXT or hasattr(nn.ModuleDict, name)
    ]
    if bad or len(set(modalities)) < len(modalities):
        faults.append(
            f"names of modalities become parts of parameter names: each once, not empty, not {_TEXT!r}, "
            f"without a dot and no method of nn.ModuleDict; got {list(modalities)}"
        )
    if isinstance(options.num_experts, Mapping) and set(options.num_experts) != set(modalities):
        faults.append(
            f"num_experts must have the names of the modalities, {', '.join(modalities)}; got "
            f"{', '.join(options.num_experts) or 'none'}"
        )
    return faults


def _faults_of_layer(layer: nn.Module, options: ExpertOptions) -> list[str]:
    inner = unwrap(layer)
    missing = [name for name in _PARTS if not isinstance(getattr(inner, name, None), nn.Module)]
    if missing:
        return [f"it lacks {', '.join(missing)}, which torchtune's decoder layers have"]
    mlp: Any = inner.mlp
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


def _build_experts(
    layer: nn.Module, modalities: Sequence[str], options: ExpertOptions
) -> ModalityExperts:
    mlp: Any = layer.mlp
    like, counts = mlp.w2.weight, {}  # new experts, and by how many a modality's tokens are shared
    if options.num_text_experts > 1:
        counts[_TEXT] = (options.num_text_experts - 1, options.num_text_experts)
    for name in modalities:
        given = options.num_experts
        number = given[name] if isinstance(given, Mapping) else given
        counts[name] = (number, number)
    dim = like.shape[0]
    experts, routers = {}, {}
    for name, (number, share) in counts.items():
        zero = name == _TEXT or options.start == "zero"
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


def _fraction(capacity: float) -> Fraction:
    # What was meant, not the binary number next to it, so that 0.07 of 100 tokens are 7 and not 8.
    return Fraction(capacity).limit_denominator(1_000_000)


def _new_expert(mlp: nn.Module, *, zero: bool) -> nn.Module:
    expert: Any = copy.deepcopy(mlp).requires_grad_(True)
    if zero:
        with torch.no_grad():
            for parameter in expert.w2.parameters():
                parameter.zero_()
    return expert
