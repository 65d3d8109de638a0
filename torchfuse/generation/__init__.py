"""Text from a fused model: rows of any length with any number of images, in one batch."""

from torchfuse.generation.decode import generate
from torchfuse.generation.sampling import sample
from torchfuse.generation.session import Session

__all__ = ["Session", "generate", "sample"]
