"""Turns captions into token ids."""

import hashlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch.nn import functional

#: Longer captions are cut before they are tokenized, so their ``num_tokens`` counts this part only.
_MAX_CAPTION_CHARS = 1 << 16

#: In place of token ids where an image has fewer captions than another of its batch.
NO_CAPTION = -1


class Tokens(NamedTuple):
    """The tokens of a batch of captions.

    Attributes:
        input_ids: int64 ``[N, L]``, padded to the longest caption of the batch, or to what the text tower takes. Where
            an image has more than one caption, ``[N, K, L]``, filled up with rows of :data:`NO_CAPTION`.
        num_tokens: Per image, the length of its longest caption before it was truncated, start and end tokens included.
        truncated: Per image, whether a caption was longer than the text tower takes.
    """

    input_ids: torch.Tensor
    num_tokens: list[int]
    truncated: list[bool]


class Encoder(Protocol):
    """Encodes captions with a model's vocabulary."""

    def __call__(self, captions: list[str]) -> tuple[list[list[int]], list[int]]:
        """Token ids without padding, cut to what the text tower takes; and how many there were before the cut."""

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, rules and limits."""


class CaptionTokenizer:
    """Encodes captions in padded batches.

    Args:
        encode: Knows the vocabulary.
        max_length: What the text tower takes, in tokens.
        pad_id: The token id that fills up shorter captions.
        pads_to_max: Whether the text tower only works on ``max_length`` tokens, as one does that attends to padding;
            otherwise a batch is as long as its longest caption.
    """

    def __init__(self, encode: Encoder, *, max_length: int, pad_id: int, pads_to_max: bool = False) -> None:
        self._encode = encode
        self.max_length = max_length
        self.pad_id = pad_id
        self.pads_to_max = pads_to_max

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, rules and limits."""
        return self._encode.fingerprint()

    def __call__(self, batch: Sequence[str | Sequence[str]]) -> Tokens:
        """Tokenize the captions of a batch of images, one or more of each; ``[]`` gives ``[0, 0]`` ids."""
        captions = [[of_image] if isinstance(of_image, str) else of_image for of_image in batch]
        flat = [bounded(caption) for of_image in captions for caption in of_image]
        ids, num_tokens = self._encode(flat)
        length = self.max_length if self.pads_to_max else max(map(len, ids), default=0)
        padded = [row + [self.pad_id] * (length - len(row)) for row in ids]
        truncated = [number > len(row) for number, row in zip(num_tokens, ids, strict=True)]
        if len(flat) > len(captions):
            ends = list(accumulate(map(len, captions)))
            runs = [slice(end - len(of_image), end) for end, of_image in zip(ends, captions, strict=True)]
            most = max(map(len, captions))
            table = torch.full((len(captions), most, length), NO_CAPTION)
            for row, run in zip(table, runs, strict=True):
                row[: run.stop - run.start] = torch.tensor(padded[run])
            return Tokens(table, [max(num_tokens[run]) for run in runs], [any(truncated[run]) for run in runs])
        input_ids = torch.tensor(padded, dtype=torch.int64) if padded else torch.empty(0, 0, dtype=torch.int64)
        return Tokens(input_ids, num_tokens, truncated)

    def used_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Per caption, int64 ``[N]``, the columns that the text tower needs of int64 ``[N, L]``.

        That is all but the padding behind, plus one that may be padding: CLIP's own end of text is what OpenAI's
        tokenizer pads with.
        """
        length = input_ids.shape[1]
        if self.pads_to_max or not input_ids.numel():
            return torch.full((len(input_ids),), length, device=input_ids.device)
        return (last_places(input_ids, self.pad_id) + 1).clamp(max=length)

    def fit(self, input_ids: torch.Tensor, length: int) -> torch.Tensor:
        """int64 ``[..., L]`` -> ``[..., length]``, padded, or cut where no caption uses the columns."""
        missing = length - input_ids.shape[-1]
        return functional.pad(input_ids, (0, missing), value=self.pad_id)

    def join(self, batches: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of several batches, int64 ``[N, L]`` or ``[N, K, L]``, as one batch."""
        length = max(batch.shape[-1] for batch in batches)
        fitted = [self.fit(batch, length) for batch in batches]
        if all(batch.ndim == 2 for batch in fitted):
            return torch.cat(fitted)
        tables = [batch if batch.ndim == 3 else batch[:, None] for batch in fitted]
        most = max(table.shape[1] for table in tables)
        return torch.cat(
            [functional.pad(table, (0, 0, 0, most - table.shape[1]), value=NO_CAPTION) for table in tables]
        )


def last_places(input_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Per row of int64 ``[N, L]``, the place of the last token that is not padding, counting from 1: int64 ``[N]``."""
    places = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    last: torch.Tensor = ((input_ids != pad_id) * places).amax(dim=1)
    return last


def bounded(caption: str) -> str:
    """The caption, cut far behind the last token that counts, so that tokenizing it takes bounded time and memory."""
    if len(caption) <= _MAX_CAPTION_CHARS:
        return caption
    # More words than characters are left of it need not be told apart.
    return " ".join(caption.split(maxsplit=_MAX_CAPTION_CHARS))[:_MAX_CAPTION_CHARS]


class RustEncoder:
    """Encodes captions with the Rust tokenizer of a ``transformers`` tokenizer.

    Args:
        tokenizer: Is copied.
        max_length: What the text tower takes, in tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self._num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, rules and limits."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def __call__(self, captions: list[str]) -> tuple[list[list[int]], list[int]]:
        """See :class:`Encoder`."""
        encodings = self._tokenizer.encode_batch(captions)
        num_tokens = [
            len(encoding.ids) + sum(len(rest.ids) - self._num_special for rest in encoding.overflowing)
            for encoding in encodings
        ]
        return [encoding.ids for encoding in encodings], num_tokens


class PythonEncoder:
    """Encodes captions with a tokenizer in Python that ends each with one special token.

    Args:
        encode: Caption -> all its token ids, special ones included.
        max_length: What the text tower takes, in tokens. A longer caption is cut, and its last token kept.
        identity: Tells vocabulary and rules apart.
    """

    def __init__(self, encode: Callable[[str], list[int]], *, max_length: int, identity: bytes) -> None:
        self._encode, self._max_length = encode, max_length
        self._fingerprint = hashlib.sha256(b"%d " % max_length + identity).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, rules and limits."""
        return self._fingerprint

    def __call__(self, captions: list[str]) -> tuple[list[list[int]], list[int]]:
        """See :class:`Encoder`."""
        rows = [self._encode(caption) for caption in captions]
        limit = self._max_length
        return [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows], [len(row) for row in rows]
