"""Probes a tokenizer with captions, since one that fits no model still gives tokens."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from clipfilter_wds.models.dual_encoder import ModelError
from clipfilter_wds.preprocess.tokens import Encoder

#: Plain English, with all letters.
_CAPTIONS = ["the quick brown fox jumps over a lazy dog", "a photo of two cats"]


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """What a tokenizer's ids mean.

    Attributes:
        vocabulary: All ids that there are.
        num_embeddings: How many the text tower has; often more, a round number.
        special: Those of start, end and padding.
        unknown: The one in place of what the vocabulary can't express; None where there is none.
        end: Token ids of a caption -> the one that the text tower takes for its end; None where it looks for none.
    """

    vocabulary: Collection[int]
    num_embeddings: int
    special: Collection[int]
    unknown: int | None
    end: Callable[[list[int]], int] | None = None


def check_tokenizer(name: str, encode: Encoder, ids: TokenIds) -> None:
    """Check that captions become tokens that the text tower of the same checkpoint can tell apart.

    Args:
        name: What the user called the model.
        encode: As it is used.
        ids: What it gives.

    Raises:
        ModelError: When tokenizer and text tower don't fit.
    """
    if fault := _fault(encode, ids):
        raise ModelError(
            f"the tokenizer of {name!r} does not fit its text tower: {fault}. tokenizer.json (or the vocabulary), "
            "tokenizer_config.json and the model's config have to be those of one checkpoint; copy them again from its "
            "source"
        )


def _fault(encode: Encoder, ids: TokenIds) -> str | None:
    largest = max([*ids.vocabulary, *ids.special], default=-1)
    if largest >= ids.num_embeddings:
        return f"its tokens are numbered up to {largest}, and the tower has embeddings for {ids.num_embeddings}"
    (first, second), _ = encode(_CAPTIONS)
    if first == second:
        return f"{_CAPTIONS[0]!r} and {_CAPTIONS[1]!r} are the same to it"
    if not (first and second) or first[-1] not in ids.special:
        return f"it ends {_CAPTIONS[0]!r} with no special token"
    if ids.unknown in (*first[1:-1], *second[1:-1]):
        return f"parts of {_CAPTIONS[0]!r} are unknown to it (token {ids.unknown})"
    if ids.end is not None and ids.end(first) != first[-1]:
        return f"it ends captions with token {first[-1]}, and the tower looks for {ids.end(first)}"
    return None
