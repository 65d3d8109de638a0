"""Quantization of pretrained linear layers, in place."""

from torchfuse.quantization.dequantize_model import dequantize
from torchfuse.quantization.quantize_model import Quantization, quantize
from torchfuse.quantization.schemes import Scheme

__all__ = ["dequantize", "quantize", "Quantization", "Scheme"]
