"""A demonstration that downloads nothing: drawn scenes with captions, and a tiny CLIP trained on them."""
