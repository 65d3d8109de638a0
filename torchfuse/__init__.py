"""Fuse a pretrained encoder into a pretrained decoder without renaming one pretrained weight."""

from torchfuse.checkpoint.artifact.fusion import (
    fusion_state_dict,
    load_fusion,
    load_fusion_state_dict,
    save_fusion,
)
from torchfuse.checkpoint.artifact.seeding import seed_adapters
from torchfuse.checkpoint.build import from_pretrained
from torchfuse.checkpoint.export import export, save_pretrained
from torchfuse.checkpoint.load import load_pretrained
from torchfuse.generation import generate
from torchfuse.models.fuse import fuse
from torchfuse.models.strategies.cross_attention import DeepFusionModel
from torchfuse.models.strategies.joint_decoder import EarlyFusionModel
from torchfuse.models.strategies.layerwise import MixtureFusionModel
from torchfuse.modules.fusion_embedding import FusionEmbedding
from torchfuse.modules.fusion_layer import FusionLayer
from torchfuse.modules.fusion_linear import FusionLinear, TiedFusionLinear
from torchfuse.params import (
    describe,
    get_fusion_params,
    param_groups,
    register_fusion_module,
    set_trainable,
)
from torchfuse.quantization import quantize

__all__ = [
    # fuse
    "fuse",
    "DeepFusionModel",
    "EarlyFusionModel",
    "MixtureFusionModel",
    # parts
    "FusionLayer",
    "FusionEmbedding",
    "FusionLinear",
    "TiedFusionLinear",
    "register_fusion_module",
    "get_fusion_params",
    # load and save
    "from_pretrained",
    "save_pretrained",
    "export",
    "load_pretrained",
    "fusion_state_dict",
    "load_fusion_state_dict",
    "save_fusion",
    "load_fusion",
    "seed_adapters",
    # run
    "generate",
    "quantize",
    # train
    "set_trainable",
    "param_groups",
    "describe",
]
