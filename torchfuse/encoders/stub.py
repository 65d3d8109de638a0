"""An encoder without weights, for tests of everything around an encoder.

Its features depend on the pixels and a seed alone: it has no parameters and no buffers. The weights that
pixels are multiplied with are computed in each call, in integers, so that they are the same on every
device and rank, and after ``to_empty``. Code that freezes, shards, saves or optimises a model must
support such a part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchfuse.errors import ConfigError, ModelError

__all__ = ["RandomEncoder"]

_MASK = 0xFFFFFFFF  # 32 bits


class RandomEncoder(nn.Module):
    """Features that are a fixed random function of the pixels.

    An image's values are split into ``num_tokens`` pieces; each feature is the tanh of a random linear
    function of its piece plus the mean of the image, so that every pixel affects every token.

    Args:
        num_tokens: features of one image.
        feature_dim: width of the features.
        seed: selects the function.
        image_size: side of the square images, in pixels. None: images of any size.

    Raises:
        ConfigError: naming every number that is out of range.

    Examples:
        >>> encoder = RandomEncoder(5, 7, seed=3)
        >>> encoder(torch.zeros(2, 3, 3, 8, 8)).shape  # two rows of three images
        torch.Size([2, 15, 7])
        >>> list(encoder.state_dict())
        []
    """

    def __init__(
        self, num_tokens: int, feature_dim: int, seed: int = 0, image_size: int | None = None
    ) -> None:
        super().__init__()
        numbers = {"num_tokens": num_tokens, "feature_dim": feature_dim, "image_size": image_size}
        problems = [
            f"{name}={number} must be at least 1"
            for name, number in numbers.items()
            if number is not None and number < 1
        ]
        if not 0 <= seed <= _MASK:
            problems.append(f"seed={seed} must lie between 0 and {_MASK}")
        if problems:
            raise ConfigError(f"RandomEncoder: {'; '.join(problems)}.")
        self.num_tokens, self.feature_dim = num_tokens, feature_dim
        self.seed, self.image_size = seed, image_size

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, feature_dim={self.feature_dim}, seed={self.seed}"

    def example_input(self) -> dict[str, Tensor]:
        """Return one black image of the smallest size."""
        return {"images": torch.zeros(1, 3, self.image_size or 1, self.image_size or 1)}

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: pixels ``[b, c, h, w]``, or ``[b, m, c, h, w]`` for ``m`` images a row.

        Returns:
            Features ``[b, m * num_tokens, feature_dim]``, image by image, in the dtype of the images.

        Raises:
            ModelError: for another shape, or images of another size than ``image_size``.
        """
        size = self.image_size
        if images.dim() not in (4, 5) or (size is not None and images.shape[-2:] != (size, size)):
            side = "h, w" if size is None else f"{size}, {size}"
            raise ModelError(
                f"RandomEncoder takes images [b, c, {side}] (or [b, m, c, {side}] for m images a row), "
                f"got {list(images.shape)}."
            )
        x = images if images.is_floating_point() else images.float()
        x = x.flatten(0, -4).flatten(1)  # [b * m, values]
        length = -(-x.shape[1] // self.num_tokens)
        pieces = F.pad(x, (0, length * self.num_tokens - x.shape[1])).unflatten(1, (-1, length))
        weight = self._noise(length, like=x, stream=0) * (3 / length) ** 0.5  # of variance 1 / length
        bias = self._noise(self.num_tokens, like=x, stream=1)
        features = torch.tanh(pieces @ weight + bias + x.mean(dim=1)[:, None, None])
        return features.unflatten(0, images.shape[:-3]).flatten(1, -2)

    def _noise(self, rows: int, *, like: Tensor, stream: int) -> Tensor:
        """Return pseudo-random numbers in [-1, 1), ``[rows, feature_dim]``."""
        x = torch.arange(rows * self.feature_dim, device=like.device)
        x = (x * 2_654_435_761 + (2 * self.seed + stream) * 40_503 + 1) & _MASK
        for _ in range(2):
            x = ((x >> 16) ^ x) * 73_244_475 & _MASK
        x = (x >> 16) ^ x
        return (x.double() / 2**31 - 1).to(like.dtype).unflatten(0, (rows, self.feature_dim))
