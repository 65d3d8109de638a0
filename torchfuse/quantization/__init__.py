"""Quantization of pretrained linear layers, in place."""

from torchfuse.quantization.quantize import Quantization, quantize
from torchfuse.quantization.schemes import Scheme

__all__ = ["quantize", "Quantization", "Scheme"]
