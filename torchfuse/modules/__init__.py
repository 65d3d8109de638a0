"""Parts of a fused model, which need only torch; sizes and pretrained layers are arguments."""

from torchfuse.modules.adapters import (
    Adapter,
    AttentionalPoolAdapter,
    AvgPoolAdapter,
    LinearAdapter,
    MLP2LayerAdapter,
    adapter_names,
    build_adapter,
    register_adapter,
)
from torchfuse.modules.cross_attention import CrossAttention, GatedCrossAttentionLayer
from torchfuse.modules.deepstack import DeepStackLayer
from torchfuse.modules.experts.auxiliary_loss import mark_main_loss
from torchfuse.modules.experts.mixture_of_transformers import MoTLayer, MoTNorm
from torchfuse.modules.experts.modality_experts import MoMaLayer, expert_load, scale_auxiliary_losses
from torchfuse.modules.experts.routing import Routing, keep_in_graph
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_layer import FusionLayer
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.modules.kv_cache import EncoderKVCache, KVCache

__all__ = [
    "Adapter",
    "AttentionalPoolAdapter",
    "AvgPoolAdapter",
    "CrossAttention",
    "DeepStackLayer",
    "EncoderKVCache",
    "FusionEmbedding",
    "FusionLayer",
    "FusionLinear",
    "GatedCrossAttentionLayer",
    "KVCache",
    "LinearAdapter",
    "MLP2LayerAdapter",
    "MoMaLayer",
    "MoTLayer",
    "MoTNorm",
    "Routing",
    "TiedFusionLinear",
    "adapter_names",
    "build_adapter",
    "expert_load",
    "keep_in_graph",
    "mark_main_loss",
    "register_adapter",
    "scale_auxiliary_losses",
]
