"""Readers of samples: files of any format, and mixtures of them."""

from torchfuse.data.readers.data_section import read_mixture
from torchfuse.data.readers.lazy_samples import Samples
from torchfuse.data.readers.mixture import Mixture
from torchfuse.data.readers.read import read_samples

__all__ = ["Mixture", "Samples", "read_mixture", "read_samples"]
