"""A model's frozen encoder alone: its features of media, and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from torchfuse.data.media import MediaInput, collate_media
from torchfuse.errors import ConfigError, ModelError
from torchfuse.naming import canonical_name, find_model, unwrap
from torchfuse.params import is_sharded
from torchfuse.tasks.image_inputs import as_tiles, tokens_per_tile

__all__ = ["FrozenEncoder"]


class FrozenEncoder:
    """The one encoder of a fused model, without its adapter.

    Args:
        model: a fused model.
        key: of the configuration that asks for it, for messages.

    Raises:
        ConfigError: if the encoder trains, or the model has several.
        ModelError: if the model is sharded.
    """

    def __init__(self, model: nn.Module, key: str) -> None:
        owner: Any = unwrap(find_model(model))
        names: list[str] = getattr(owner, "encoder_names", [])
        if len(names) != 1:
            raise ConfigError(
                f"{key} needs a model with one encoder, got {', '.join(names) or 'none'}: leave it out."
            )
        self.model, [self._name] = owner, names
        self._encoder: nn.Module = owner.get_encoder(self._name)
        parameters = dict(self._encoder.named_parameters())
        training = [canonical_name(key) for key, p in parameters.items() if p.requires_grad]
        if training:
            raise ConfigError(
                f"{key} needs a frozen encoder, and {len(training)} of its parameters train "
                f"({', '.join(training[:3])}{', ...' * (len(training) > 3)}): freeze them, or leave "
                f"{key} out."
            )
        if any(map(is_sharded, parameters.values())):
            raise ModelError(f"{key}: features are computed before the model is sharded.")

    def describe(self) -> dict[str, Any]:
        """Return the class of the encoder, and dtype, shape and a hash of all its tensors by name."""
        tensors = {canonical_name(name): t for name, t in self._encoder.state_dict().items()}
        with ThreadPoolExecutor() as threads:  # hashing and copying release the interpreter
            hashes = threads.map(_describe, tensors.values())
            described = dict(zip(tensors, hashes, strict=True))
        kind = type(unwrap(self._encoder))
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "tensors": described}

    @torch.no_grad()
    def __call__(self, media: Sequence[MediaInput]) -> list[Tensor]:
        """Return the features of media with equally many items, ``[t, n, d_e]`` for each.

        Raises:
            ModelError: if the number of features is no multiple of the number of items.
        """
        inputs, _ = collate_media([[each] for each in media])
        device = next(p.device for part in (self._encoder, self.model) for p in part.parameters())
        given = {name: tensor.to(device) for name, tensor in as_tiles(self.model, inputs).items()}
        self._encoder.eval()  # as in training, where all that is frozen is
        features = self.model.run_encoder(self._name, given)
        first, per_tile = media[0], tokens_per_tile(self.model)
        items = first.max_items or first.num_items
        if per_tile is not None:
            items = features.shape[1] // per_tile
        if features.shape[1] % items:
            raise ModelError(
                f"The encoder returned {features.shape[1]} features for {items} items: expected equally "
                "many for each."
            )
        return list(features.unflatten(1, (items, -1))[:, : first.num_items])


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {_hash(tensor).hexdigest()[:16]}"


def _hash(tensor: Any) -> Any:
    """Return the SHA-256 of a tensor's values; of a quantized one, those of all tensors in it."""
    result = hashlib.sha256()
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            result.update(_hash(getattr(tensor, name)).digest())
    else:
        data = tensor.detach().cpu().contiguous().reshape(-1)
        result.update(data.view(torch.uint8).numpy())
    return result
