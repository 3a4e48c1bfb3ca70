"""What the package does on a GPU, in a few minutes: ``python -m benchmarks gpu``."""
