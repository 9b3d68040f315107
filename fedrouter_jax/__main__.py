"""`python -m fedrouter_jax`."""

import sys

from fedrouter_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
