"""Activation checkpointing and compilation of the layers of a fused model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from torchfuse.naming import named_parameters
from torchfuse.params import parts_of

__all__ = ["checkpoint_activations", "compile_layers", "layer_lists", "layers_of"]


def layer_lists(part: nn.Module) -> Iterator[nn.ModuleList]:
    """Iterate over the outermost module lists of a part: its layers."""
    for child in part.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from layer_lists(child)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of decoder and encoders, with the fusion layers in them.

    Args:
        model: a fused model, or any module.
    """
    lists = [layers for part in parts_of(model).values() for layers in layer_lists(part)]
    return [layer for layers in lists for layer in layers]


def checkpoint_activations(model: nn.Module, trained: Collection[str]) -> dict[str, int]:
    """Wrap layers in place so that their activations are computed again in the backward pass.

    The layers of the decoder are wrapped, with their fusion layers, and those of each encoder in which
    something trains. Other encoders keep no activations, as no gradient flows through them.

    Args:
        model: a fused model that is neither sharded nor compiled yet.
        trained: names of the parameters that will train.

    Returns:
        The number of layers by part.

    Examples:
        >>> from torchfuse.models.decoders.llama import llama_decoder
        >>> sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 16}
        >>> decoder = llama_decoder(vocab_size=11, num_layers=2, max_seq_len=16, **sizes)
        >>> checkpoint_activations(decoder, ["layers.0.attn.q_proj.weight"])
        {'decoder': 2}
    """
    # Takes a second to import.
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    ids = {id(p) for name, p in named_parameters(model) if name in trained}
    wrapped: dict[str, int] = {}
    for name, part in parts_of(model).items():
        if name != "decoder" and not any(id(p) in ids for p in part.parameters()):
            continue
        for layers in layer_lists(part):
            for index, layer in enumerate(layers):
                layers[index] = checkpoint_wrapper(layer)
            wrapped[name] = wrapped.get(name, 0) + len(layers)
    return wrapped


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each layer of decoder and encoders in place, with its fusion layer.

    Layers of one kind share their compiled code, which takes less time than to compile a whole model,
    and FSDP2 gathers the weights of one while another computes.

    Args:
        model: a fused model that is not sharded yet.
        **options: for ``torch.compile``, such as ``backend``.

    Examples:
        >>> from torchfuse.models.decoders.llama import llama_decoder
        >>> sizes = {"num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 16}
        >>> decoder = llama_decoder(vocab_size=11, num_layers=2, max_seq_len=16, **sizes)
        >>> compile_layers(decoder, backend="eager")  # at their first call
    """
    for layer in layers_of(model):
        layer.compile(**options)
