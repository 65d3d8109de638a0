"""Loading: batches of every optimizer step, read by worker processes."""

from torchfuse.data.loading.options import LoaderOptions
from torchfuse.data.loading.order import Cursor
from torchfuse.data.loading.steps import StepLoader
from torchfuse.data.loading.token_counts import count_tokens

__all__ = ["Cursor", "LoaderOptions", "StepLoader", "count_tokens"]
