"""`python -m fastrlhf` is the command `fastrlhf`."""

import sys

from fastrlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
