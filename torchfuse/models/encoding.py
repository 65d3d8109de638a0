"""A module with encoders and adapters that computes features for the decoder.

One encoder without a name has the keys ``encoder.`` and ``adapter.``, named ones have
``encoders.<name>.`` and ``adapters.<name>.``; features are by name in both cases. Inputs are cast where
they enter: pixels to the encoder's dtype, features to the adapter's, its output to the decoder's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError
from torchfuse.models.encoder_output import computed_before
from torchfuse.models.types import UNNAMED, EncoderFeatures, EncoderInput, EncoderMask, OnMissing

__all__ = ["EncoderOwner", "encoder_names"]


def encoder_names(encoder: nn.Module | Mapping[str, nn.Module]) -> list[str]:
    """Return the names of encoders; ``["encoder"]`` for one without a name.

    Raises:
        ConfigError: if there is none, or a name cannot be part of a parameter's.
    """
    if not isinstance(encoder, Mapping | nn.ModuleDict):
        return [UNNAMED]
    if not encoder:
        raise ConfigError("A fused model needs at least one encoder, got an empty mapping.")
    bad = [n for n in encoder if not n or "." in n or hasattr(nn.ModuleDict, n)]
    if bad:
        raise ConfigError(
            "Names of encoders become parts of parameter names: they must not be empty, hold a dot "
            f"or be a method of nn.ModuleDict. Got {', '.join(map(repr, bad))}."
        )
    return list(encoder)


class EncoderOwner(nn.Module):
    """A module that holds one encoder without a name, or several by name, and their adapters."""

    encoder: nn.Module
    encoders: nn.ModuleDict
    adapter: nn.Module | None
    adapters: nn.ModuleDict | None
    on_missing: OnMissing
    example_input: EncoderInput | None

    def _own_encoders(
        self,
        encoder: nn.Module | Mapping[str, nn.Module],
        adapter: nn.Module | Mapping[str, nn.Module] | None,
        on_missing: OnMissing,
        example_input: EncoderInput | None,
    ) -> None:
        self.example_input = example_input
        if isinstance(encoder, Mapping | nn.ModuleDict):
            self._own_by_name(dict(encoder.items()), adapter)
        elif isinstance(adapter, Mapping):
            raise ConfigError("One encoder without a name takes one adapter, got several by name.")
        else:
            self.encoder = encoder
            self.adapter = adapter
        self.set_on_missing(on_missing)

    def set_on_missing(self, on_missing: OnMissing) -> None:
        """Choose what happens to an encoder in a batch without input for it, see ``FusedModel``.

        Raises:
            ConfigError: if it is neither ``"skip"`` nor ``"participate"``.
            ModelError: if an encoder that is to participate has no example input.
        """
        if on_missing not in ("skip", "participate"):
            raise ConfigError(f'on_missing must be "skip" or "participate", got {on_missing!r}.')
        if on_missing == "participate":
            for name in self.encoder_names:
                self._example_input(name)
        self.on_missing = on_missing

    def _own_by_name(
        self,
        encoders: dict[str, nn.Module],
        adapter: nn.Module | Mapping[str, nn.Module] | None,
    ) -> None:
        encoder_names(encoders)
        adapters = dict(adapter.items()) if isinstance(adapter, Mapping | nn.ModuleDict) else {}
        if adapter is not None and adapters.keys() != encoders.keys():
            raise ConfigError(
                f"Adapters must have the names of the encoders, {', '.join(encoders)}; got "
                f"{', '.join(adapters) or type(adapter).__name__}."
            )
        self.encoders = nn.ModuleDict(encoders)
        self.adapters = nn.ModuleDict(adapters) if adapters else None

    @property
    def _named(self) -> bool:
        return "encoders" in self._modules

    @property
    def encoder_names(self) -> list[str]:
        """The names of the encoders; ``["encoder"]`` for one without a name."""
        return list(self.encoders) if self._named else [UNNAMED]

    def get_encoder(self, name: str) -> nn.Module:
        """Return the encoder of a name in ``encoder_names``."""
        return self.encoders[name] if self._named else self.encoder

    def get_adapter(self, name: str) -> nn.Module | None:
        """Return the adapter of an encoder; None if it has none."""
        if not self._named:
            return self.adapter
        return None if self.adapters is None else self.adapters[name]

    def encoder_parts(self) -> dict[str, nn.Module]:
        """Return the encoders as parts of a model: ``"encoder"``, or ``"encoder.<name>"`` for each."""
        if not self._named:
            return {"encoder": self.encoder}
        return {f"encoder.{name}": self.encoders[name] for name in self.encoders}

    def encode(self, encoder_input: EncoderInput) -> Any:
        """Run encoders and adapters once, for any number of calls with ``encoder_embeds=``.

        Args:
            encoder_input: keywords of the encoder; ``{name: keywords}`` when encoders have names.
                With ``encoder_output`` alone, what ``run_encoder`` returned (``[b, n, d_e]``, or
                ``[b, ..., n, d_e]`` for several images a row), only the adapter runs.

        Returns:
            Features ``[b, n, d]`` in the decoder's width and dtype; by name when encoders have names.

        Raises:
            ModelError: for an unknown name, features that are no ``[b, n, d_e]``, or the output of an
                encoder that trains.
        """
        embeds = {name: self._encode(name, kw) for name, kw in self._by_name(encoder_input).items()}
        return embeds if self._named else embeds[UNNAMED]

    def _by_name(self, given: Any) -> dict[str, Any]:
        """Sort what was given for the encoders by name, in the order of the encoders."""
        if not self._named:
            return {UNNAMED: given}
        names = self.encoder_names
        if not isinstance(given, Mapping):
            raise ModelError(
                f"This model has the encoders {', '.join(names)}: their inputs, features and masks must "
                f"be mappings by name, got a {type(given).__name__}."
            )
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ModelError(f"No encoder named {', '.join(unknown)}; there are {', '.join(names)}.")
        return {name: given[name] for name in names if given.get(name) is not None}

    def _features(
        self,
        tokens: Tensor,
        encoder_input: EncoderInput | None,
        encoder_embeds: Tensor | Mapping[str, Tensor] | None,
        encoder_mask: EncoderMask | None,
        *,
        participate: bool,
        encoder_slots: int | None,
    ) -> dict[str, EncoderFeatures]:
        """Compute the features of a batch by encoder, in the same order on every rank."""
        if encoder_input is not None and encoder_embeds is not None:
            raise ModelError("Give encoder_input or encoder_embeds, not both.")
        inputs = {} if encoder_input is None else self._by_name(encoder_input)
        ready = {} if encoder_embeds is None else self._by_name(encoder_embeds)
        embeds: dict[str, Tensor] = {}
        for name in self.encoder_names:
            if name in inputs:
                embeds[name] = self._encode(name, inputs[name])
            elif name in ready:
                embeds[name] = self._checked(name, ready[name])
            elif participate:
                # One row and one feature are enough for the graph.
                embeds[name] = self._encode(name, self._example_input(name))[:1, :1]
        present = {name for name in embeds if name in inputs or name in ready}
        if isinstance(encoder_mask, Tensor) and encoder_mask.shape[-1] == encoder_slots:
            encoder_mask = encoder_mask[..., : sum(e.shape[1] for e in embeds.values())]
        masks = self._split_mask(tokens, encoder_mask, {n: embeds[n] for n in embeds if n in present})
        return {n: EncoderFeatures(e, masks.get(n), n in present) for n, e in embeds.items()}

    def _split_mask(
        self, tokens: Tensor, encoder_mask: EncoderMask | None, embeds: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if encoder_mask is None or not embeds:
            return {}
        lengths = {name: e.shape[1] for name, e in embeds.items()}
        if isinstance(encoder_mask, Tensor):
            if encoder_mask.shape[-1] != sum(lengths.values()):
                raise ModelError(
                    f"encoder_mask covers {encoder_mask.shape[-1]} features, but there are "
                    + " + ".join(f"{n} of {name!r}" for name, n in lengths.items())
                    + "."
                )
            split = encoder_mask.split(list(lengths.values()), dim=-1)
            masks = dict(zip(lengths, split, strict=True))
        elif not self._named:
            raise ModelError("One encoder without a name takes one encoder_mask, got a mapping.")
        else:
            masks = {name: m for name, m in self._by_name(encoder_mask).items() if name in embeds}
        for name, mask in masks.items():
            shapes = ([*tokens.shape, lengths[name]], [tokens.shape[0], lengths[name]])
            if mask.dtype != torch.bool or list(mask.shape) not in shapes:
                raise ModelError(
                    f"The encoder_mask of {name!r} must be bool (True: may attend) with shape "
                    f"{shapes[0]} or {shapes[1]}, got {mask.dtype} {list(mask.shape)}."
                )
        return masks

    def run_encoder(self, name: str, encoder_input: Any) -> Tensor:
        """Run the encoder of a name in ``encoder_names`` without its adapter.

        Returns:
            Features ``[b, n, d_e]``, with a gradient only if the encoder or its input needs one.

        Raises:
            ModelError: for an input that is no mapping, or an encoder that returns no tensor.
        """
        if not isinstance(encoder_input, Mapping):
            raise ModelError(
                f"The input of {name!r} must be a mapping of the encoder's keywords, got a "
                f"{type(encoder_input).__name__}."
            )
        encoder = self.get_encoder(name)
        keywords = _cast(encoder_input, _dtype_of(encoder))
        learns = any(p.requires_grad for p in encoder.parameters()) or any(
            isinstance(value, Tensor) and value.requires_grad for value in keywords.values()
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            features = encoder(**keywords)
        if not isinstance(features, Tensor):
            raise ModelError(
                f"The encoder {name!r} ({type(encoder).__name__}) must return features [b, n, d_e], "
                f"got a {type(features).__name__}. Wrap it in a module that picks the tensor."
            )
        return features

    def _encode(self, name: str, encoder_input: Any) -> Tensor:
        features = computed_before(name, self.get_encoder(name), encoder_input)
        if features is None:
            features = self.run_encoder(name, encoder_input)
        adapter = self.get_adapter(name)
        if adapter is not None:
            features = adapter(features.to(_dtype_of(adapter) or features.dtype))
        return self._checked(name, features)

    def _checked(self, name: str, features: Any) -> Tensor:
        """Check features and cast them: ``[b, n, d]`` in the decoder's width and dtype."""
        table = self._table()
        width = "d" if table is None else table.shape[-1]
        fits = isinstance(features, Tensor) and features.dim() in (2, 3)
        if not fits or (table is not None and features.shape[-1] != width):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ModelError(
                f"The features of {name!r} must have shape [b, n, {width}] when they reach the "
                f"decoder, got {got}. Is an adapter missing?"
            )
        features = features if features.dim() == 3 else features[None]
        return features.to(table.dtype) if table is not None and table.is_floating_point() else features

    def _table(self) -> Tensor | None:
        """Return the weight of the decoder's embeddings; None if it has no such module."""
        embedding = getattr(self, "tok_embeddings", None)
        return next(embedding.parameters(), None) if isinstance(embedding, nn.Module) else None

    def _example_input(self, name: str) -> EncoderInput:
        encoder = self.get_encoder(name)
        given = {} if self.example_input is None else self._by_name(self.example_input)
        example = given.get(name)
        if example is None:
            ask = getattr(encoder, "example_input", None)
            if not callable(ask):
                raise ModelError(
                    f'on_missing="participate" needs an input to run {name!r} on when a batch has '
                    f"none: pass example_input=, or give {type(encoder).__name__} a method "
                    "example_input()."
                )
            example = ask()
        table = self._table()  # for encoders without parameters
        on_device = [*encoder.parameters(), *([] if table is None else [table])]
        device = on_device[0].device if on_device else None
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in example.items()}


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype that a module computes in, by its first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _cast(keywords: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    return {
        key: value.to(dtype)
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point()
        else value
        for key, value in keywords.items()
    }
