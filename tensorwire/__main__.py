"""`python -m tensorwire`."""

import sys

from tensorwire.cli import main

if __name__ == "__main__":
    sys.exit(main())
