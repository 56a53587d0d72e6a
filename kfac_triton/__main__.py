"""`python -m kfac_triton` is the same as the command `kfac-triton`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
