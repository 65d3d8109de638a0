"""``python -m torchfuse``: the command ``torchfuse``."""

import sys

from torchfuse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
