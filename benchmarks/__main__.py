"""``python -m benchmarks [NAMES] [--size vit-b-32] ...``."""

import os

# Before torch is loaded, as in clipfilter_wds.__main__: threads that wait by spinning take the workers' processors.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    from benchmarks.run import main

    main()
