"""Makes the pictures of the documents anew: ``python -m pictures --help``."""
