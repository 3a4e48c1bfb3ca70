"""Does the shards of a run: in this process, on several ranks, or on a Ray cluster."""
