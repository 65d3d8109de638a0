"""Parameters: which ones fusion added, which train and when, and their groups for an optimizer."""

from torchfuse.params.freezing import FreezeSpec, apply_freeze_specs, freeze_params
from torchfuse.params.groups import param_groups
from torchfuse.params.parts import LORA, partition, parts_of
from torchfuse.params.schedule import FreezeSchedule
from torchfuse.params.stages import (
    FreezeStage,
    canonical_freeze_meta,
    effective_freeze,
    read_freeze_meta,
)
from torchfuse.params.storage import is_sharded, quantized_dtype, storage_nbytes
from torchfuse.params.table import Description, PartSummary, describe
from torchfuse.params.tagging import (
    adapter_ids,
    fusion_buffers,
    get_fusion_params,
    register_fusion_module,
)
from torchfuse.params.trainable import set_trainable

__all__ = [
    "LORA",
    "Description",
    "FreezeSchedule",
    "FreezeSpec",
    "FreezeStage",
    "PartSummary",
    "adapter_ids",
    "apply_freeze_specs",
    "canonical_freeze_meta",
    "describe",
    "effective_freeze",
    "freeze_params",
    "fusion_buffers",
    "get_fusion_params",
    "is_sharded",
    "param_groups",
    "partition",
    "parts_of",
    "quantized_dtype",
    "read_freeze_meta",
    "register_fusion_module",
    "set_trainable",
    "storage_nbytes",
]
