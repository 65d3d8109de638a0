"""Which tokens of a sequence belong to which modality, for layers with weights of their own for each.

Text has the pretrained weights, every other modality (an encoder, by name) its own new weights. Layers
take a modality's tokens out, run its weights on them, and put the results back. In a prefix layout that
is slicing. Where modalities alternate it is a gather to as many slots as there are features, wherever
they are, so that shapes never depend on values; text's weights run on every position then. The indices
are computed once, for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Routing", "keep_in_graph"]


def keep_in_graph(x: Tensor, stand_in: Tensor) -> Tensor:
    """Return ``x`` bit-identical, as a function of the stand-in too, whose gradient is zero."""
    never = torch.zeros((), dtype=torch.bool, device=x.device)
    return torch.where(never, stand_in.sum().to(x.dtype), x)


@dataclass(frozen=True)
class Routing:
    """The modalities of a sequence of ``t`` tokens.

    Attributes:
        slots: how many slots each modality but text has, by name, in the order of the prefix. Where
            modalities alternate: at least as many as it has tokens in a row, and at most ``t``.
        places: where modalities alternate: the positions of each, bool ``[b, t]``, by name. None: they
            come one after the other in front of the text.
        valid: which slots hold a token, bool ``[b, slots]``, by name; all where there is no entry.
        valid_text: which tokens of text are no padding, bool ``[b, text]``; None: all.
        stand_ins: features ``[1, n, d]`` of modalities that this batch lacks but whose weights must take
            part in the computation, without changing a bit of it.
        features: what ``keep_features`` kept, ``[b, slots, d]``, by name.
        positions: where modalities alternate, the positions of each one's tokens, ``[b, slots]``, by
            name; computed unless given.
        ranks: likewise, which of its slots belongs to each position, ``[b, t]``.

    Examples:
        >>> x = torch.arange(5.0).view(1, 5, 1)
        >>> places = {"image": torch.tensor([[False, True, True, False, True]])}
        >>> routing = Routing({"image": 3}, places)
        >>> routing.take("image", x).flatten().tolist()
        [1.0, 2.0, 4.0]
        >>> routing.merge(-x, {"image": routing.take("image", x)}).flatten().tolist()
        [-0.0, 1.0, 2.0, -3.0, 4.0]
    """

    slots: Mapping[str, int]
    places: Mapping[str, Tensor] | None = None
    valid: Mapping[str, Tensor] = field(default_factory=dict)
    valid_text: Tensor | None = None
    stand_ins: Mapping[str, Tensor] = field(default_factory=dict)
    # FSDP2 makes copies by dataclasses.replace, for which every field must be an argument.
    features: dict[str, Tensor] = field(repr=False, default_factory=dict)
    positions: dict[str, Tensor] = field(repr=False, default_factory=dict)
    ranks: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, place in (self.places or {}).items():
            if name not in self.positions:
                order = (~place).to(torch.int8).argsort(dim=1, stable=True)
                self.positions[name] = order[:, : self.slots[name]]
                rank = place.cumsum(dim=1) - 1
                self.ranks[name] = rank.clamp(min=0, max=self.slots[name] - 1)

    def keep_features(self, embeds: Tensor) -> None:
        """Keep the values in the slots of ``embeds`` ``[b, t, d]``, for layers to use again."""
        self.features.update({name: self.take(name, embeds) for name in self.slots})

    def text(self, x: Tensor) -> Tensor:
        """Return the input of text's weights, ``[b, text, d]``: all of ``x`` if modalities alternate."""
        return x if self.places is not None else x[:, sum(self.slots.values()) :]

    def take(self, name: str, x: Tensor) -> Tensor:
        """Return a modality's tokens, ``[b, slots, d]``; a slot without a token repeats another."""
        if self.places is None:
            start = 0
            for other, length in self.slots.items():
                if other == name:
                    return x[:, start : start + length]
                start += length
            raise KeyError(name)
        index = self.positions[name].unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return x.gather(1, index)

    def merge(self, text: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Merge outputs of text ``[b, text, d]`` and of modalities ``[b, slots, d]``: ``[b, t, d]``."""
        if self.places is None:
            return torch.cat([*(parts[name] for name in self.slots), text], dim=1)
        for name, part in parts.items():
            rank = self.ranks[name].unsqueeze(-1).expand(-1, -1, part.shape[-1])
            text = torch.where(self.places[name].unsqueeze(-1), part.gather(1, rank), text)
        return text

    def is_text(self, x: Tensor) -> Tensor | None:
        """Return which of ``text(x)`` are tokens of text, bool ``[b, text]``; None: all."""
        if not self.places:
            return self.valid_text
        others = torch.stack(list(self.places.values())).any(dim=0)
        return ~others if self.valid_text is None else self.valid_text & ~others

    def holds_token(self, name: str) -> Tensor | None:
        """Return which slots of a modality hold a token, bool ``[b, slots]``; None: all."""
        if self.places is None:
            return self.valid.get(name)
        counts = self.places[name].sum(dim=1, keepdim=True)
        return torch.arange(self.slots[name], device=counts.device) < counts
