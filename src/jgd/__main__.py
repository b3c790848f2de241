"""`python -m jgd` is the command `jgd`."""

import sys

from jgd.cli import main

if __name__ == "__main__":
    sys.exit(main())
