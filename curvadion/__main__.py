"""`python -m curvadion COMMAND ...`, the same as `curvadion COMMAND ...`."""

import sys

from curvadion.cli import main

if __name__ == "__main__":
    sys.exit(main())
