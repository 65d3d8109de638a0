"""Errors that a caller can cause and mend, by what has to be mended.

Each is a ``ValueError``, so that code which catches those keeps working. Recipes print a
``ConfigError``, a ``DataError`` or a ``CheckpointError`` as one sentence; any other exception keeps
its traceback.
"""

__all__ = ["CheckpointError", "ConfigError", "DataError", "FusionError", "ModelError"]


class FusionError(ValueError):
    """Base of all errors that torchfuse raises on purpose."""


class ConfigError(FusionError):
    """An option or a key of a configuration is unknown, missing or out of range."""


class DataError(FusionError):
    """A sample, an image or a file of samples cannot be used."""


class CheckpointError(FusionError):
    """A file, a directory or a state dict cannot be read, written or loaded into this model."""


class ModelError(FusionError):
    """Modules or tensors do not fit each other, or a model cannot do what was requested."""
