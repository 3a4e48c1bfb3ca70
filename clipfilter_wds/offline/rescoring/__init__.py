"""Makes score tables from score tables: derives better scores, and drops near-duplicates."""
