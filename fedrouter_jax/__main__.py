"""`python -m fedrouter_jax`, and the `fedrouter` script."""

import os
import sys


def console() -> None:
    """Run the command, and leave by its exit code."""
    try:
        from fedrouter_jax.cli import main  # here, for an interrupt may come while modules are read

        code = main()
    except KeyboardInterrupt:
        code = 130
    if code:
        # At once: where a checkpoint could not be written, threads of Orbax would be waited for, some for minutes.
        for stream in filter(None, (sys.stdout, sys.stderr)):  # which a daemon may lack
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    console()
