"""Checking of samples before training: every row, with all errors in one report."""

from torchfuse.data.checking.check import check_samples
from torchfuse.data.checking.report import Report, RowProblem

__all__ = ["Report", "RowProblem", "check_samples"]
