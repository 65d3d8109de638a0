"""Image files as an encoder's pixels: opened, resized, cropped or tiled, and normalised."""

from torchfuse.data.images.grid import GridImageTransform
from torchfuse.data.images.opening import image_size, open_image
from torchfuse.data.images.processor import find_processor
from torchfuse.data.images.tiles import TiledImageTransform
from torchfuse.data.images.transform import ImageTransform

__all__ = [
    "GridImageTransform",
    "ImageTransform",
    "TiledImageTransform",
    "find_processor",
    "image_size",
    "open_image",
]
