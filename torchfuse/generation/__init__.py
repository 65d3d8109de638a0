"""Generation: rows of any length with any number of images, with caches and compiled steps."""

from torchfuse.generation.decode import generate
from torchfuse.generation.sampling import Sampling, sample
from torchfuse.generation.session import Session

__all__ = ["Sampling", "Session", "generate", "sample"]
