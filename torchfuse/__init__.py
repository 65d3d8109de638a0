"""Fuse a pretrained encoder into a pretrained decoder without renaming one pretrained weight."""

import torchfuse_torchao
from torchfuse.checkpoint import (
    from_pretrained,
    fusion_state_dict,
    load_fusion,
    load_fusion_state_dict,
    load_lora,
    load_pretrained,
    save_fusion,
    seed_adapters,
    set_lora,
)
from torchfuse.checkpoint.export import export, save_pretrained
from torchfuse.errors import CheckpointError, ConfigError, DataError, FusionError, ModelError
from torchfuse.generation import generate
from torchfuse.lora import add_lora, merge_lora
from torchfuse.models import DeepFusionModel, EarlyFusionModel, MixtureFusionModel
from torchfuse.models.fuse import fuse
from torchfuse.modules import FusionEmbedding, FusionLayer, FusionLinear, TiedFusionLinear
from torchfuse.params import (
    describe,
    get_fusion_params,
    param_groups,
    register_fusion_module,
    set_trainable,
)
from torchfuse.quantization import quantize

__version__ = "0.2.0"

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
    "load_lora",
    "set_lora",
    # run
    "generate",
    "quantize",
    # train
    "set_trainable",
    "add_lora",
    "merge_lora",
    "param_groups",
    "describe",
    # errors
    "FusionError",
    "ConfigError",
    "DataError",
    "CheckpointError",
    "ModelError",
]

torchfuse_torchao.install()  # torchtune is imported later, by what needs it
