"""Starts the program: ``clipfilter-wds`` and ``python -m clipfilter_wds``."""

import gc
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    # Must come before torch is loaded. Threads of the forward pass that spin while they wait take the CPUs from the
    # workers that decode for them; on two shared cores that made runs up to ten times as slow.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from clipfilter_wds import cli
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        cli.main()
    finally:
        gc.freeze()  # at the end Python looks through all that there is, which takes a second and finds nothing


if __name__ == "__main__":
    main()
