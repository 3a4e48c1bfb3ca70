"""Makes of a sample what the model sees: pixels and tokens."""
