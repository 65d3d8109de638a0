"""A decoder layer whose feed-forward is a group of experts for each modality.

Mixture of Modality-Aware Experts (https://arxiv.org/abs/2407.21770): attention is shared, a token is
sent to the experts of its modality, and there each expert chooses its tokens (see
``torchfuse.modules.experts.expert_choice``). Here the layer is a pretrained one. Its
attention stays as it is, and its feed-forward becomes the first expert of text.

That expert departs from the paper, in which all experts of text choose: it takes every token of text
with weight 1, and the others choose and add to it, beginning with an output of zero. A choice would
take from most tokens the only feed-forward that the model was trained with, and what it gave the
rest would be scaled by a score. So a text keeps the pretrained logits to the bit, in training and
evaluation, until training moves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.modules.experts.building import TEXT, build_experts
from torchfuse.modules.experts.expert_choice import ModalityExperts
from torchfuse.modules.experts.options import ExpertOptions
from torchfuse.modules.experts.routing import Routing
from torchfuse.modules.experts.transformer_expert import are_equal, first_values
from torchfuse.modules.fusion_wrapper import FusionWrapper
from torchfuse.naming import canonical_name, unwrap, unwrap_model

__all__ = ["ExpertOptions", "MoMaLayer", "expert_load", "scale_auxiliary_losses"]

_DEPENDS_ON_BATCH: Final = (
    "each chooses its tokens among all of a batch, later ones and those of other rows too. Build "
    "them with auxiliary_router=True, and train them, so that each token is chosen independently"
)


class MoMaLayer(FusionWrapper):
    """A pretrained decoder layer with experts of each modality in place of its one feed-forward.

    ``x + attn(norm(x))`` is the pretrained layer's. What is added to that is the pretrained
    feed-forward's for text, the new experts' for other modalities, and both for text with more than one
    expert. Names are the pretrained layer's (see ``torchfuse.naming.TransparentWrapper``); new
    parameters are under ``fusion_layer.experts.<modality>.<i>.`` and
    ``fusion_layer.routers.<modality>.`` and are what ``fusion_params`` names. Other attributes
    of the pretrained layer, its cache too, are attributes of this layer. Without auxiliary routers other
    tokens affect the choice in evaluation, too; a fused model raises an error then (``check_mode``).

    Args:
        layer: a decoder layer with torchtune's parts: ``sa_norm``, ``attn``, ``sa_scale``,
            ``mlp_norm``, ``mlp`` and ``mlp_scale``. The new experts are copies of its ``mlp``.
        modalities: the names of the modalities other than text.
        options: how many experts there are, and how they choose. None: four of each, and no new one of
            text.

    Raises:
        ModelError: if the layer or a name cannot serve, or ``num_experts`` has other names.
    """

    layer: nn.Module
    fusion_layer: ModalityExperts

    def __init__(
        self, layer: nn.Module, modalities: Sequence[str], options: ExpertOptions | None = None
    ) -> None:
        super().__init__()
        options = ExpertOptions() if options is None else options
        self.options = options
        self.fusion_layer = build_experts(unwrap(layer), modalities, options)
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
            zero = name == TEXT or self.options.start == "zero"
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
            **kwargs: what the decoder passes to every layer, not used here.

        Returns:
            Hidden states, ``[b, t, d]``.

        Raises:
            ModelError: if there are no experts of a modality; if the pretrained layer is sharded as a
                module of its own.
        """
        self.refuse_sharded()
        if routing is not None:
            own = self.modalities
            unknown = sorted({*routing.slots, *routing.stand_ins} - {*own})
            if unknown:
                raise ModelError(
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
            ModelError: if the experts choose among all tokens of a batch in evaluation too.
        """
        self.check_caches()
        layer: Any = self.wrapped
        layer.setup_caches(batch_size, dtype, **lengths)

    def check_caches(self) -> None:
        """Raise a ``ModelError`` if the experts choose among all tokens of a batch in evaluation too."""
        if self.fusion_layer.depends_on_batch:
            raise ModelError(f"These experts cannot generate: {_DEPENDS_ON_BATCH}.")

    def check_mode(self, *, training: bool, cached: bool) -> None:
        """Raise a ``ModelError`` if the choice of a token would depend on others where that is wrong.

        Args:
            training: whether the model is in training mode. The layer's own mode does not show it: a
                frozen layer is in evaluation mode in training, too.
            cached: whether caches are read and written.
        """
        if not training and self.fusion_layer.depends_on_batch:
            raise ModelError(
                f"These experts cannot be evaluated: {_DEPENDS_ON_BATCH}. For the training loss call "
                "model.train()."
            )
        if cached and self.fusion_layer.training:
            raise ModelError(
                "Caches are set up, but in training mode each expert chooses its tokens among those of "
                "one call, so the answer would be another than without caches. Call model.eval(); "
                "torchtune.modules.delete_kv_caches(model) removes the caches."
            )

    @property
    def modalities(self) -> list[str]:
        """The names of the modalities other than text."""
        return [name for name in self.fusion_layer.experts if name != TEXT]

    def _run(self, x: Tensor, mask: Any, input_pos: Tensor | None, routing: Routing | None) -> Tensor:
        layer: Any = self.wrapped
        h = layer.sa_norm(x)
        h = layer.sa_scale(layer.attn(h, h, mask=mask, input_pos=input_pos)) + x
        return h + layer.mlp_scale(self._feed_forward(layer.mlp, layer.mlp_norm(h), routing))

    def _feed_forward(self, mlp: nn.Module, x: Tensor, routing: Routing | None) -> Tensor:
        routing = Routing(slots={}) if routing is None else routing
        experts, text = self.fusion_layer, routing.text(x)
        y = mlp(text)
        if TEXT in experts.experts:
            y = y + experts(TEXT, text, routing.is_text(text))
        parts = {
            name: experts(name, routing.take(name, x), routing.holds_token(name))
            for name in routing.slots
        }
        if parts:
            y = routing.merge(y, parts)
        for name, stand_in in routing.stand_ins.items():
            y = experts.keep_in_graph(name, stand_in, y)
        return y


def expert_load(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the share of its modality that each new expert took when it last ran.

    The numbers stay on the device until a caller reads them, and are this rank's.

    Args:
        model: a model with ``MoMaLayer``s in it.

    Returns:
        By canonical name of the layer and by modality the share of the modality's tokens that each
        expert took, ``[E]``; zeros where there was none. The pretrained expert of text is left out: it
        takes all.

    Raises:
        ModelError: if the model has no such layer.
    """
    model = unwrap_model(model)
    load = {
        canonical_name(name): {
            modality: router.taken / router.num_tokens.clamp(min=1)
            for modality in module.fusion_layer.routers
            for router in [module.fusion_layer.router(modality)]
        }
        for name, module in model.named_modules()
        if isinstance(module, MoMaLayer)
    }
    if not load:
        raise ModelError(f"{type(model).__name__} has no layer with experts of modalities.")
    return load


def scale_auxiliary_losses(model: nn.Module, scale: float) -> None:
    """Set what the losses of auxiliary routers are multiplied by if the main loss is not marked.

    They follow a marked main loss (``mark_main_loss``, ``next_token_loss``) without this. Otherwise each
    is a mean over a batch that joins every backward pass: a loop that adds up the gradients of ``k``
    batches for one step gives ``1 / k``. Ranks whose gradients are averaged need nothing more.

    Args:
        model: any model; one without auxiliary routers has nothing to scale.
        scale: 0 or more.

    Raises:
        ConfigError: if the number is out of range.
    """
    if not 0 <= scale < float("inf"):
        raise ConfigError(f"The scale of auxiliary losses must be 0 or more, and finite; got {scale}.")
    for module in model.modules():
        if isinstance(module, ModalityExperts):
            module.auxiliary_loss_scale = float(scale)
