"""LoRA adapters over one base model, loaded by name and switched in place.

An adapter consists of the LoRA layers of an artifact, which share the base's parameters, and of those
other fusion tensors of the artifact whose values differ from the base's. One adapter of a model is
active: its layers are the model's. The others are kept beside the model and are in no state dict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from torchfuse.checkpoint.artifact.fusion import load_artifact, read_artifact
from torchfuse.checkpoint.artifact.state_dict import fusion_tensors
from torchfuse.checkpoint.tensors import copy_into
from torchfuse.errors import CheckpointError, ConfigError, ModelError
from torchfuse.lora.add import add_described_lora
from torchfuse.lora.layers import linear_of, lora_layers
from torchfuse.lora.targets import linear_places
from torchfuse.modules.kv_cache import holds_sequence
from torchfuse.naming import unwrap_model

__all__ = ["load_lora", "set_lora"]

_ATTRIBUTE: Final = "_lora_adapters"
_FIRST: Final = "default"


@dataclass
class _Adapter:
    """LoRA layers by name (of the base: linear layers), and fusion tensors."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Adapters:
    """The base and the adapters of a model."""

    base: _Adapter = field(default_factory=_Adapter)
    by_name: dict[str, _Adapter] = field(default_factory=dict)
    active: str | None = None


def load_lora(model: nn.Module, path: str | Path, name: str) -> list[str]:
    """Add the LoRA layers of an artifact to a model as a named adapter, and make it active.

    Layers, rank and alpha are the artifact's, and may differ from other adapters'. Where fusion trained
    beside LoRA, its values are the adapter's too. LoRA layers that the model has already are the adapter
    ``"default"``.

    Args:
        model: a fused model, with its pretrained parts loaded, not sharded.
        path: directory of an artifact of ``save_fusion`` or ``save_trained`` with LoRA layers.
        name: the name of the adapter.

    Returns:
        The canonical names of its LoRA layers.

    Raises:
        ConfigError: if there is an adapter of this name.
        ModelError: if caches for generation hold a sequence.
        CheckpointError: if there is no such artifact, it has no LoRA layers, or it is not for this
            model; the model is unchanged then.

    Examples:
        >>> import copy
        >>> from tempfile import TemporaryDirectory
        >>> from torchfuse import add_lora, fuse, save_fusion
        >>> from torchfuse.models.decoders.llama import llama_decoder
        >>> sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 16}
        >>> decoder = llama_decoder(vocab_size=11, num_layers=2, max_seq_len=16, **sizes)
        >>> model = fuse(decoder, nn.Linear(3, 5), encoder_dim=5, every=2)
        >>> adapted = copy.deepcopy(model)
        >>> _ = add_lora(adapted, rank=2, alpha=4, targets=["q_proj"])
        >>> with TemporaryDirectory() as path:
        ...     save_fusion(adapted, path)
        ...     load_lora(model, path, "charts")
        ['decoder.layers.0.attn.q_proj', 'decoder.layers.1.attn.q_proj']
    """
    owner = unwrap_model(model)
    adapters = _adapters_of(owner)
    if name in adapters.by_name:
        raise ConfigError(f"There is an adapter {name!r} already; choose another name.")
    artifact = read_artifact(path)
    described = artifact.description.get("lora")
    if not described:
        raise CheckpointError(f"{path} has no LoRA layers; load_fusion loads it.")
    before = adapters.active
    _switch(owner, adapters, None)
    old = {n: t.detach().clone() for n, t in fusion_tensors(owner).items()}
    try:
        try:
            added = add_described_lora(owner, described)
        except ValueError as error:
            raise CheckpointError(f"{path} is not for this model: {error}") from error
        layers = dict(lora_layers(owner))
        adapters.base.layers |= {n: linear_of(layers[n]) for n in added}
        load_artifact(owner, path, strict=True)
    except BaseException:
        _switch(owner, adapters, before)
        raise
    now = {n: t.detach() for n, t in fusion_tensors(owner).items() if n in old}
    changed = {n: t.clone() for n, t in now.items() if not torch.equal(old[n], t)}
    adapters.base.tensors |= {n: old[n] for n in changed}
    adapters.by_name[name] = _Adapter(layers, changed)
    adapters.active = name
    owner.__dict__[_ATTRIBUTE] = adapters
    return added


def set_lora(model: nn.Module, name: str | None) -> None:
    """Make another adapter of a model active, in place.

    Args:
        model: a model with adapters of ``load_lora``.
        name: the adapter's name. None: none of them, the base.

    Raises:
        ConfigError: if there is no such adapter.
        ModelError: if caches for generation hold a sequence.

    Examples:
        >>> from torchfuse import add_lora
        >>> model = nn.Sequential(nn.Linear(3, 5))
        >>> _ = add_lora(model, rank=2, alpha=4, targets=["0"])
        >>> set_lora(model, None)
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
        >>> set_lora(model, "default")  # the layers that it had
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '0.lora_a.weight', '0.lora_b.weight']
    """
    owner = unwrap_model(model)
    adapters = _adapters_of(owner)
    if name is not None and name not in adapters.by_name:
        there = ", ".join(adapters.by_name) or "none"
        raise ConfigError(f"There is no adapter {name!r}; there are {there}. load_lora adds one.")
    owner.__dict__[_ATTRIBUTE] = adapters
    _switch(owner, adapters, name)


def _adapters_of(owner: nn.Module) -> _Adapters:
    """Return a model's adapters, of which its present LoRA layers are the first."""
    if holds_sequence(owner):
        raise ModelError(
            "The caches hold keys and values of the present layers: reset or close the session, or call "
            "reset_caches(), before another adapter becomes active."
        )
    found: _Adapters | None = owner.__dict__.get(_ATTRIBUTE)
    present = dict(lora_layers(owner))
    if found is None:
        found = _Adapters()
        if present:
            found.base.layers = {name: linear_of(layer) for name, layer in present.items()}
            found.by_name, found.active = {_FIRST: _Adapter(present)}, _FIRST
    elif present != (found.by_name[found.active].layers if found.active is not None else {}):
        raise ConfigError(
            "LoRA layers were added or merged since load_lora: build the model and load its "
            "adapters again."
        )
    return found


@torch.no_grad()
def _switch(owner: nn.Module, adapters: _Adapters, name: str | None) -> None:
    """Put the layers and tensors of an adapter, or of the base, into the model."""
    base = adapters.base
    adapter = base if name is None else adapters.by_name[name]
    for place in linear_places(owner):
        if place.name in base.layers:
            layer: Any = adapter.layers.get(place.name, base.layers[place.name])
            weight, added = place.layer.weight, getattr(layer, "lora_a", None)
            layer.weight, layer.bias = weight, place.layer.bias  # quantized since, for example
            if added is not None and (added.weight.device, added.weight.dtype) != (
                weight.device,
                weight.dtype,
            ):
                layer.to(weight.device, weight.dtype)
            place.put(layer.train(place.layer.training))
    if base.tensors:
        targets = fusion_tensors(owner)
        for key, value in base.tensors.items():
            copy_into(targets[key], adapter.tensors.get(key, value))
    adapters.active = name
