"""Data: questions about images, image transforms, masks, collation."""

from typing import TYPE_CHECKING

from torchfuse._lazy import lazy_exports
from torchfuse.data.collate import padded_collate_images
from torchfuse.data.masks import causal_mask, image_mask, left_padding, positions

if TYPE_CHECKING:
    from torchfuse.data.checking import Report, check_samples
    from torchfuse.data.documents import merge_documents
    from torchfuse.data.images import (
        GridImageTransform,
        ImageTransform,
        TiledImageTransform,
        image_size,
        open_image,
    )
    from torchfuse.data.loading import Cursor, LoaderOptions, StepLoader
    from torchfuse.data.media import MediaInput, MediaTransform, collate_media
    from torchfuse.data.media_reader import MediaReader
    from torchfuse.data.packing import FirstFit, Packs, pack
    from torchfuse.data.questions import (
        QuestionDataset,
        QuestionTransform,
    )
    from torchfuse.data.readers import Mixture, Samples, read_mixture, read_samples
    from torchfuse.data.samples import Media, Message, Sample
    from torchfuse.data.templates import ChatTemplate, text_template
    from torchfuse.data.tokenizer import TextTokenizer
    from torchfuse.data.transform import SampleTransform
    from torchfuse.data.truncate import cut_between_turns
    from torchfuse.data.video import VideoTransform

__all__ = [
    "Cursor",
    "LoaderOptions",
    "StepLoader",
    "ChatTemplate",
    "FirstFit",
    "GridImageTransform",
    "ImageTransform",
    "Media",
    "MediaInput",
    "MediaReader",
    "MediaTransform",
    "Message",
    "Mixture",
    "Packs",
    "QuestionDataset",
    "QuestionTransform",
    "Report",
    "Sample",
    "SampleTransform",
    "Samples",
    "TextTokenizer",
    "TiledImageTransform",
    "VideoTransform",
    "causal_mask",
    "check_samples",
    "collate_media",
    "cut_between_turns",
    "image_mask",
    "image_size",
    "left_padding",
    "merge_documents",
    "open_image",
    "pack",
    "padded_collate_images",
    "positions",
    "read_mixture",
    "read_samples",
    "text_template",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Cursor": "loading",
        "LoaderOptions": "loading",
        "StepLoader": "loading",
        "ChatTemplate": "templates",
        "FirstFit": "packing",
        "GridImageTransform": "images",
        "ImageTransform": "images",
        "Media": "samples",
        "MediaInput": "media",
        "MediaReader": "media_reader",
        "MediaTransform": "media",
        "Message": "samples",
        "Mixture": "readers",
        "Packs": "packing",
        "QuestionDataset": "questions",
        "QuestionTransform": "questions",
        "Report": "checking",
        "Sample": "samples",
        "SampleTransform": "transform",
        "Samples": "readers",
        "TextTokenizer": "tokenizer",
        "TiledImageTransform": "images",
        "VideoTransform": "video",
        "check_samples": "checking",
        "collate_media": "media",
        "cut_between_turns": "truncate",
        "image_size": "images",
        "merge_documents": "documents",
        "open_image": "images",
        "pack": "packing",
        "read_mixture": "readers",
        "read_samples": "readers",
        "text_template": "templates",
    },
)
