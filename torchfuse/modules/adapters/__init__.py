"""Adapters from the width of an encoder to that of a decoder."""

from torchfuse.modules.adapters.base import Adapter, adapter_names, build_adapter, register_adapter
from torchfuse.modules.adapters.grid import AttentionalPoolAdapter, AvgPoolAdapter
from torchfuse.modules.adapters.projection import LinearAdapter, MLP2LayerAdapter

__all__ = [
    "Adapter",
    "AttentionalPoolAdapter",
    "AvgPoolAdapter",
    "LinearAdapter",
    "MLP2LayerAdapter",
    "adapter_names",
    "build_adapter",
    "register_adapter",
]
