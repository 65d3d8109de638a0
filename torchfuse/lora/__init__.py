"""LoRA, DoRA and QLoRA: small trainable matrices beside frozen linear layers."""

from torchfuse.lora.add import add_lora
from torchfuse.lora.merge import merge_lora

__all__ = ["add_lora", "merge_lora"]
