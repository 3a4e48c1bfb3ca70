"""Looks for near-duplicates in clusters of the kept rows, with faiss. Needs the extra ``dedup``."""

from types import ModuleType

import numpy as np
from torch import Tensor

from clipfilter_wds.scores.rescore.blocks import exact_cosines, unit_rows

#: Clusters that a row is looked for in.
_NUM_PROBED = 16
#: Rows that the centre of each cluster is computed from.
_ROWS_PER_CLUSTER = 64


class ClusteredSearch:
    """Compares each row with the most similar one in the clusters that are nearest to it.

    Args:
        embeddings: All rows, kept or not: float16 or float32 ``[N, D]``. Their square root of N clusters are found on
            a part of them.
        similarity: From which cosine on two images are near-duplicates.

    Raises:
        ValueError: When faiss is not installed.
    """

    def __init__(self, embeddings: np.ndarray, similarity: float) -> None:
        faiss = import_faiss()
        self._similarity = similarity
        num_rows, dim = embeddings.shape
        num_clusters = max(1, round(num_rows**0.5))
        self._quantizer = faiss.IndexFlatIP(dim)
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer, dim, num_clusters, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
        )
        self._index.cp.spherical = True
        self._index.cp.min_points_per_centroid = 1  # of fewer than 39 faiss would warn
        self._index.nprobe = _NUM_PROBED
        step = max(1, num_rows // (num_clusters * _ROWS_PER_CLUSTER))
        self._index.train(embeddings[::step].astype(np.float32))

    def near(self, block: Tensor, kept: Tensor) -> np.ndarray:
        """See ``KeptSearch``."""
        _, found = self._index.search(unit_rows(block).cpu().numpy(), 1)
        near: np.ndarray = found[:, 0] >= 0  # -1 where the clusters are empty
        rows = np.flatnonzero(near)
        near[rows] = (exact_cosines(block[rows], kept[found[rows, 0]]) >= self._similarity).cpu().numpy()
        return near

    def add(self, block: Tensor) -> None:
        """See ``KeptSearch``."""
        self._index.add(unit_rows(block).cpu().numpy())


def import_faiss() -> ModuleType:
    """The module faiss.

    Raises:
        ValueError: When it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "a search in clusters takes faiss: pip install 'clipfilter-wds[dedup]'; --search exact needs none, and "
            "compares all pairs"
        ) from None
    module: ModuleType = faiss
    return module
