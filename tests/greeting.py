"""An architecture that is not built in: one class, one decorator.

It is registered for the tests that use it only, so that no other test has a sixth architecture.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from torchfuse.models import ModalityContext, ModalityStrategy, register_modality_strategy, strategy
from torchfuse.models.strategies.prefix import by_row
from torchfuse.modules.experts.routing import keep_in_graph

ARCH = "greeting"


@register_modality_strategy(ARCH)
class GreetingStrategy(ModalityStrategy):
    """Add the mean of a row's features to the embedding of its first token.

    Args:
        scale: factor of the mean.
    """

    scale: float = 1.0

    def prepare(self, model, tokens, features, *, mask, encoder_mask, input_pos):
        if not features:
            return ModalityContext(tokens, mask=mask, input_pos=input_pos)
        embeds = model.tok_embeddings(tokens)
        at = torch.arange(tokens.shape[1]) if input_pos is None else input_pos
        first = by_row(at, *tokens.shape) == 0
        for given in features.values():
            if not given.present:
                embeds = keep_in_graph(embeds, given.embeds)
                continue
            valid = torch.ones(given.embeds.shape[:2], dtype=torch.bool)
            if given.mask is not None:
                valid = given.mask if given.mask.dim() == 2 else given.mask.any(dim=1)
            share = functional.normalize(valid.to(embeds.dtype), p=1, dim=1)
            mean = (given.embeds * share[..., None]).sum(dim=1, keepdim=True)
            embeds = embeds + self.scale * mean * first[..., None]
        return ModalityContext(tokens, embeds, mask=mask, input_pos=input_pos)


strategy._REGISTRY.pop(ARCH)


def register(patch=None):
    """Register the architecture, until a test ends if its ``monkeypatch`` is given."""
    if patch is None:
        strategy._REGISTRY[ARCH] = GreetingStrategy
    else:
        patch.setitem(strategy._REGISTRY, ARCH, GreetingStrategy)
