"""Makes shards whose kept samples are spread over the ranks as unevenly as can be."""

import logging
from itertools import count
from pathlib import Path

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.training.stream import StreamOrder
from tests.support.restore import Recipe, image_number, score_by_key, write_numbered
from tests.support.toys import tar_members

NUM_SAMPLES = 200
SHARES = (0.0, 0.01, 0.5, 1.0)
ENDS = ({"end": "sync"}, {"end": "repeat", "batches_per_epoch": 6})


def score_numbers(clip_folder: Path, folder: Path) -> dict[int, float]:
    """Scores of the samples, by number."""
    shards = write_numbered(folder, [list(range(NUM_SAMPLES))])
    return {int(key): score for key, score in score_by_key(Recipe(clip=clip_folder, shards=shards)).items()}


def sorted_recipe(
    clip_folder: Path, folder: Path, scored: dict[int, float], world_size: int, *, shuffle: int = 0
) -> Recipe:
    """Shards such that, at a keep rate up to one half, all kept samples of an epoch go to one half of the ranks."""
    ranked = sorted(scored, key=scored.__getitem__, reverse=True)
    # Two shards for each rank; of every world_size in a row, the first half hold the best.
    per_shard = NUM_SAMPLES // (2 * world_size)
    pieces = [ranked[first : first + per_shard] for first in range(0, NUM_SAMPLES, per_shard)]
    good, bad = pieces[:world_size], pieces[world_size:]
    half = world_size // 2
    order = [*good[:half], *bad[:half], *good[half:], *bad[half:]]
    return Recipe(
        clip=clip_folder,
        shards=write_numbered(folder, order),
        dataset={"shuffle": shuffle, "image_transform": image_number},
        loader={"batch_size": 4, "score_batch_size": 8},
    )


def check_each_pass_is_shared_out(handed: list[list[str]], recipe: Recipe, kept: set[str]) -> None:
    """Each rank was given, pass for pass, the kept samples of its own shards, which in that pass are no other rank's.

    Args:
        handed: Per rank the keys that it was given, in order.
        recipe: Of an endless stream that is not shuffled, without workers.
        kept: Keys of the samples that pass.
    """
    urls, ranks = expand_shards(recipe.shards), range(len(handed))
    keys = {url: list(dict.fromkeys(name.split(".")[0] for name, _ in tar_members(Path(url)))) for url in urls}
    order = StreamOrder(urls=urls, shuffle=0, seed=0, num_streams=len(handed), num_groups=len(handed))
    streams: list[list[str]] = [[] for _ in ranks]
    for number in count():
        if all(len(streams[rank]) >= len(handed[rank]) for rank in ranks):
            break
        shares = [[part.url for part in order.parts(number, rank)] for rank in ranks]
        assert sorted(url for share in shares for url in share) == urls
        for stream, share in zip(streams, shares, strict=True):
            stream += [key for url in share for key in keys[url] if key in kept]
    assert handed == [stream[: len(given)] for stream, given in zip(streams, handed, strict=True)]


class Warnings(logging.Handler):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("clipfilter_wds").addHandler(self)

    def emit(self, log_record: logging.LogRecord) -> None:
        self.messages.append(log_record.getMessage())


def break_scorer(scorer: ClipScorer, after: int) -> None:
    """Let a scorer fail in its forward pass, as a GPU does, after so many that go well."""
    passes = count()

    def fail(*_: object) -> None:
        if next(passes) >= after:
            raise RuntimeError("device-side assert triggered")

    scorer.fast.register_forward_pre_hook(fail)
