"""Data: questions about images, image transforms, masks, collation."""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.masks import causal_mask, image_mask, left_padding, positions

if TYPE_CHECKING:
    from torchfuse.data.documents import merge_documents
    from torchfuse.data.images import ImageTransform, open_image
    from torchfuse.data.media import MediaInput, MediaTransform, collate_media
    from torchfuse.data.packing import FirstFit, Packs, pack
    from torchfuse.data.questions import (
        Question,
        QuestionDataset,
        QuestionTransform,
        check_questions,
        read_questions,
    )
    from torchfuse.data.steps import optimizer_steps
    from torchfuse.data.tokenizer import TextTokenizer
    from torchfuse.data.truncate import cut_between_turns

__all__ = [
    "FirstFit",
    "ImageTransform",
    "MediaInput",
    "MediaTransform",
    "Packs",
    "Question",
    "QuestionDataset",
    "QuestionTransform",
    "TextTokenizer",
    "causal_mask",
    "check_questions",
    "collate_media",
    "cut_between_turns",
    "image_mask",
    "left_padding",
    "merge_documents",
    "open_image",
    "optimizer_steps",
    "pack",
    "padded_collate_images",
    "positions",
    "read_questions",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "FirstFit": "packing",
        "ImageTransform": "images",
        "MediaInput": "media",
        "MediaTransform": "media",
        "Packs": "packing",
        "Question": "questions",
        "QuestionDataset": "questions",
        "QuestionTransform": "questions",
        "TextTokenizer": "tokenizer",
        "check_questions": "questions",
        "collate_media": "media",
        "cut_between_turns": "truncate",
        "merge_documents": "documents",
        "open_image": "images",
        "optimizer_steps": "steps",
        "pack": "packing",
        "read_questions": "questions",
    },
)
