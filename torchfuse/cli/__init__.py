"""The command ``torchfuse``."""
