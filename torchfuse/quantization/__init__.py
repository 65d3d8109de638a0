"""Quantization of pretrained linear layers, in place."""

from torchfuse.quantization.quantize_model import Quantization, quantize
from torchfuse.quantization.schemes import Scheme

__all__ = ["quantize", "Quantization", "Scheme"]
