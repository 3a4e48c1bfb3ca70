"""Speed of the filter beside the loops that it replaces and the limits of the machine: ``python -m benchmarks``."""
