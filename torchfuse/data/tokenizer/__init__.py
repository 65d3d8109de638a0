"""The tokenizer of a language model."""

from torchfuse.data.tokenizer.text import TextTokenizer

__all__ = ["TextTokenizer"]
