"""Turns pixels and tokens into embeddings on a GPU, in low precision, at next to no cost for the host."""

import numpy as np
import torch
from torch import Tensor

from clipfilter_wds.models.device import pixels_to_device, to_device
from clipfilter_wds.models.dual_encoder import DualEncoder
from clipfilter_wds.models.encoder import Check, Encoder, no_check
from clipfilter_wds.models.fast.buckets import ROW_COUNTS, caption_lengths, group_by_length, row_count
from clipfilter_wds.models.fast.graphs import Graphs
from clipfilter_wds.models.fast.low_precision import low_precision_towers


class GraphedEncoder(Encoder):
    """Embeds in low precision, with a copy of the model's towers, in batches of a few shapes.

    Images are filled up to the next row count, and captions to the next length too, with others of that length. Equal
    captions are encoded once. All that looks at captions is done on the host, before anything is sent to the device.

    Args:
        model: The loaded model.
        flip: See :class:`Encoder`.
        dtype: Likewise.
        graphs: Captures the towers, once per shape.
    """

    def __init__(self, model: DualEncoder, *, flip: bool, dtype: torch.dtype, graphs: Graphs) -> None:
        towers, _ = low_precision_towers(model, dtype, packed=False)
        super().__init__(model, towers, flip=flip, dtype=dtype, graphs=graphs, fill=row_count)
        tokenize = model.preprocess.tokenize
        self._lengths = caption_lengths(tokenize.max_length, pads_to_max=tokenize.pads_to_max)

    def encode_image(self, pixel_values: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        pixel_values = pixels_to_device(pixel_values, self.device)
        return self._encode(pixel_values.split(ROW_COUNTS[-1]), self._images, check)

    def encode_text(self, input_ids: Tensor, *, check: Check = no_check) -> Tensor:
        """See :class:`Encoder`."""
        lengths = self._lengths
        if input_ids.shape[1] > lengths[-1]:  # more than the tower takes, which says so
            lengths = (*lengths, input_ids.shape[1])
        if input_ids.device.type != "cpu":  # to look at them would be to wait for the device
            length = next(length for length in lengths if length >= input_ids.shape[1])
            batches = self._tokenize.fit(to_device(input_ids, self.device), length).split(ROW_COUNTS[-1])
            return self._encode(batches, self._texts, check)
        first, inverse = _distinct_rows(input_ids)
        distinct = input_ids[torch.from_numpy(first)]
        groups = group_by_length(self._tokenize.used_lengths(distinct).numpy(), lengths)
        host = [self._tokenize.fit(distinct[torch.from_numpy(group.rows)], group.length) for group in groups]
        host.append(torch.from_numpy(np.concatenate([group.rows for group in groups]).argsort()[inverse]))
        # In one copy.
        sent = to_device(torch.cat([part.flatten() for part in host]), self.device)
        *batches, places = [
            part.view(of.shape) for part, of in zip(sent.split([part.numel() for part in host]), host, strict=True)
        ]
        return self._encode(batches, self._texts, check)[places]

    def warm_up(self, num_rows: int) -> None:
        """Capture what batches of up to so many rows are computed by."""
        counts = [count for count in ROW_COUNTS if count <= row_count(num_rows)]
        for count in reversed(counts):  # so that the others fit into the memory of the largest
            self.encode_image(torch.zeros(count, 3, *self._view_size, dtype=torch.uint8))
            for length in reversed(self._lengths):
                ids = torch.zeros(count, length, dtype=torch.int64, device=self.device)
                self._encode([ids], self._texts, no_check)


def _distinct_rows(input_ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of int64 ``[N, L]``: where each of the M distinct rows comes first ``[M]``, and which of them each is ``[N]``."""
    rows = np.ascontiguousarray(input_ids.numpy())
    whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0]
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return first, inverse
