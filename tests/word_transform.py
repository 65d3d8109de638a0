"""A transform of samples without a tokenizer, for tests of what is around it."""

import torch

from torchfuse.data import open_image
from torchfuse.errors import DataError


class WordTransform:
    """One token for each word and each image; answers are learned."""

    def __init__(self, max_seq_len=None, layout="marker"):
        self.max_seq_len, self.layout = max_seq_len, layout

    def media_input(self, media):
        open_image(media)
        return torch.ones(1, 3, 2, 2)

    def __call__(self, sample):
        if sample.answer is None:
            raise DataError(f"{sample.origin} has no answer.")
        tokens, labels = [1], [-100]
        for message in sample.messages:
            for part in message.content:
                ids = [len(word) + 2 for word in part.split()] if isinstance(part, str) else [0]
                learned = message.role == "assistant" and message.weight
                tokens += ids
                labels += ids if learned else [-100] * len(ids)
        images = [self.media_input(media) for media in sample.media]
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            raise DataError(f"{sample.origin} is too long.")
        features = torch.ones(len(tokens), 3 * len(images), dtype=torch.bool)
        images = torch.cat(images) if images else torch.ones(0, 3, 2, 2)
        return {"tokens": tokens, "labels": labels, "images": images, "encoder_mask": features}
