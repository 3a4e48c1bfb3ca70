"""Shows what a threshold keeps, as one HTML page."""
