"""Features of media on disk, which a transform reads in place of pixels."""

from torchfuse.data.features.missing import FoundMedia, MissingMedia
from torchfuse.data.features.reader import FeatureReader
from torchfuse.data.features.settings import describe_settings, list_differences
from torchfuse.data.features.store import FeatureStore, FeatureWriter, hash_file

__all__ = [
    "FeatureReader",
    "FeatureStore",
    "FeatureWriter",
    "FoundMedia",
    "MissingMedia",
    "describe_settings",
    "hash_file",
    "list_differences",
]
