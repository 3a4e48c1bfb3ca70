"""Dataset -> scorer -> selection -> batches of constant size, while training runs; resumable, on any ranks."""

from clipfilter_wds.loader.config import End, LoaderConfig
from clipfilter_wds.loader.loader import ClipFilterLoader

__all__ = ["ClipFilterLoader", "End", "LoaderConfig"]
