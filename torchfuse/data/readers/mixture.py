"""Several sets of samples in one order, by weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchfuse.data.readers.lazy_samples import Samples
from torchfuse.errors import ConfigError

__all__ = ["Mixture"]


class Mixture:
    """Sets of samples that are shuffled together, each with its share of an epoch.

    The order is a function of seed and epoch. Without weights, an epoch is every sample once. With
    weights, it has as many samples as the sets have together, and each set's number of them is
    proportional to its weight: a set runs through its samples in one random order after another, from
    epoch to epoch, so that none comes a second time before all others came once.

    Args:
        parts: the sets with their weights; either all weights are None or none is.
        seed: of the order.

    Attributes:
        samples: all samples of all sets, one set after another.

    Raises:
        ConfigError: if there is no set, one is empty, or a weight is missing, not above 0 or so small
            that its set has no sample in an epoch.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from torchfuse.data import read_samples
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "questions.json")
        ...     _ = file.write_text(json.dumps([{"question": name} for name in "abcdefgh"]))
        ...     samples = read_samples(file)
        ...     mixture = Mixture([(samples[:6], 3), (samples[6:], 1)])
        ...     sorted(sample.messages[0].text for sample in mixture.epoch(0))
        ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h']
    """

    def __init__(self, parts: Sequence[tuple[Samples, float | None]], *, seed: int = 0) -> None:
        sizes, weights = [len(samples) for samples, _ in parts], [weight for _, weight in parts]
        if not parts or not all(sizes):
            raise ConfigError(f"A mixture needs sets of samples that are not empty, got sizes {sizes}.")
        given = [weight for weight in weights if weight is not None]
        if len(given) not in (0, len(parts)) or not all(0 < weight < np.inf for weight in given):
            raise ConfigError(
                f"Give every set of a mixture a weight above 0, or none of them, got {weights}."
            )
        self.samples = Samples.concatenate([samples for samples, _ in parts])
        self.seed = seed
        self._sizes = sizes
        self._counts = _shares(given or sizes, sum(sizes))
        if not all(self._counts):
            raise ConfigError(
                f"The weights {weights} give sets of sizes {sizes} {self._counts} samples of an epoch; "
                "a set without any would never be drawn."
            )

    @property
    def digest(self) -> str:
        """A digest of the samples, see ``Samples.digest``; weights and seed are not part of it."""
        return self.samples.digest

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return sum(self._counts)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the indices into ``samples`` of an epoch, in its order."""
        chosen, start = [], 0
        for part, (size, count) in enumerate(zip(self._sizes, self._counts, strict=True)):
            rounds = range(epoch * count // size, -(-(epoch + 1) * count // size))
            orders = [_generator(self.seed, part, number).permutation(size) for number in rounds]
            if orders:
                at = epoch * count - rounds.start * size
                chosen.append(np.concatenate(orders)[at : at + count] + start)
            start += size
        everything = np.concatenate(chosen)
        return _generator(self.seed, len(self._sizes), epoch).permutation(everything)

    def epoch(self, epoch: int) -> Samples:
        """Return the samples of an epoch, in its order."""
        return self.samples.select(self.order(epoch))


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide a total in proportion to weights, by largest remainders."""
    exact = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64) * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts.tolist()


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
