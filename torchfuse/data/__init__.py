"""Data: questions about images, image transforms, masks, collation."""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.masks import causal_mask, image_mask, left_padding, positions

if TYPE_CHECKING:
    from torchfuse.data.images import ImageTransform, open_image
    from torchfuse.data.media import MediaInput, MediaTransform, collate_media
    from torchfuse.data.questions import (
        Question,
        QuestionDataset,
        QuestionTransform,
        check_questions,
        read_questions,
    )
    from torchfuse.data.steps import optimizer_steps
    from torchfuse.data.tokenizer import TextTokenizer

__all__ = [
    "ImageTransform",
    "MediaInput",
    "MediaTransform",
    "Question",
    "QuestionDataset",
    "QuestionTransform",
    "TextTokenizer",
    "causal_mask",
    "check_questions",
    "collate_media",
    "image_mask",
    "left_padding",
    "open_image",
    "optimizer_steps",
    "padded_collate_images",
    "positions",
    "read_questions",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "ImageTransform": "images",
        "MediaInput": "media",
        "MediaTransform": "media",
        "Question": "questions",
        "QuestionDataset": "questions",
        "QuestionTransform": "questions",
        "TextTokenizer": "tokenizer",
        "check_questions": "questions",
        "collate_media": "media",
        "open_image": "images",
        "optimizer_steps": "steps",
        "read_questions": "questions",
    },
)
