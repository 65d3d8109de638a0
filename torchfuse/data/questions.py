"""Question files in torchtune's recipes, under the names that configurations have for them.

A question file has a JSON object a line:

    {"question": "<image> which digit ?", "answer": "seven", "images": ["7.png"], "kind": "digit"}

``<image>`` marks the position of an image, once for each; without any, the images come first. Paths are
relative to the file. ``answer`` is needed for training and evaluation only; ``images`` may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from torchfuse.data.documents import ImageLayout
from torchfuse.data.images import GridImageTransform, ImageTransform, TiledImageTransform
from torchfuse.data.masks import ImageScope
from torchfuse.data.readers import read_samples
from torchfuse.data.readers.read_all import read_all
from torchfuse.data.transform import SampleTransform
from torchfuse.errors import ConfigError

__all__ = ["QuestionDataset", "QuestionTransform"]


class QuestionTransform(SampleTransform):
    """The transform of samples with the template ``"plain"``.

    Args:
        tokenizer: as for ``SampleTransform``, like all others.
        image_token: id of an image in the sequence.
        features_per_image: features of an image after encoder and adapter.
        image_transform: directory of the encoder, or an ``ImageTransform`` of whole images.
        layout: the tokens of an image in the sequence.
        scope: which images a token may attend to.
        max_seq_len: the longest sequence.
        cache_images: how many images' pixels to keep in memory.

    Raises:
        ConfigError: if options contradict each other.
        CheckpointError: if a directory lacks its file.
    """

    def __init__(
        self,
        tokenizer: str | Path,
        *,
        image_token: int | None,
        features_per_image: int,
        image_transform: str | Path | ImageTransform,
        layout: ImageLayout = "marker",
        scope: ImageScope = "last",
        max_seq_len: int | None = None,
        cache_images: int = 0,
    ) -> None:
        super().__init__(
            tokenizer,
            image_token=image_token,
            features_per_image=features_per_image,
            image_transform=image_transform,
            template="plain",
            layout=layout,
            scope=scope,
            max_seq_len=max_seq_len,
            cache_images=cache_images,
        )
        if isinstance(self.image_transform, TiledImageTransform | GridImageTransform):
            raise ConfigError(
                f"image_transform is a {type(self.image_transform).__name__}, but every image of a "
                "question has the same number of features: give an ImageTransform of whole images."
            )


class QuestionDataset(Dataset[dict[str, Any]]):
    """The questions of a file, encoded for training.

    Args:
        transform: turns a question into a sample; a torchtune recipe passes its tokenizer here.
        path: the question file.
        limit: how many of the file's questions to use, from its start; None: all.
        packed: torchtune's option, which cannot be used.

    Raises:
        ConfigError: if ``packed`` is true.
        DataError: naming each line that is wrong, or the first question without answer or too long.
    """

    def __init__(
        self,
        transform: QuestionTransform,
        path: str | Path,
        limit: int | None = None,
        packed: bool = False,
    ) -> None:
        if packed:
            raise ConfigError(
                "dataset.packed=True: torchtune's recipes pack text only. Set it to False, or train "
                "with the recipe torchfuse/recipes/finetune.py and data.packed=true, which packs images."
            )
        self.transform = transform
        self.samples = read_all(read_samples(path, format="question"), path)[:limit]
        for sample in self.samples:
            transform.length(sample)  # an error for one without answer, or too long

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.transform(self.samples[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
