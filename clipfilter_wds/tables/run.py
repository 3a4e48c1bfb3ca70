"""Runs over a table: reads rows, scores their pairs, and writes the rows that are kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import BinaryIO

import numpy as np
from rich.console import Console

from clipfilter_wds.console import Shown, show_progress
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.storage.publish import publish, remove_leftovers_of
from clipfilter_wds.tables.config import TableConfig
from clipfilter_wds.tables.formats.convert import converting_writer
from clipfilter_wds.tables.formats.open import open_table
from clipfilter_wds.tables.formats.rows import Rows, TableReader, TableWriter, Wanted
from clipfilter_wds.tables.fraction import ScoredTable
from clipfilter_wds.tables.progress import print_pair_summary, shown
from clipfilter_wds.tables.scoring import Pair, PairScores, score_pairs
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.workers.cpus import default_num_workers


def process_table(config: TableConfig, load_scorer: Callable[[], ClipScorer], *, quiet: bool = False) -> PairTally:
    """Write the rows of a table whose caption describes the image, and show how far the run is and what came of it.

    Kept rows are written in order, and unchanged where the output is of the input's type. Memory holds a few batches of
    rows, whatever the size of the table (except for a ``.json`` array, which is held whole), and five bytes per row
    where a fraction is kept.

    Args:
        config: What to read and write.
        load_scorer: Loads the model; not called when the table can't be used.
        quiet: Show nothing.

    Returns:
        What became of the rows.

    Raises:
        ValueError: When the table can't be read or lacks a column.
        OSError: When the output can't be written.
        WorkerDiedError: When worker processes die one after another.
    """
    console = Console(stderr=True, quiet=quiet)
    wanted = Wanted(
        image_key=config.image_key,
        caption_key=config.caption_key,
        score_key=config.score_key,
        num_rows=config.batch_size or _BATCH_SIZE,
    )
    with open_table(config.source, wanted) as reader:
        _check_target(reader, config)
        with console.status("loading the model"):
            scorer = load_scorer()
        with show_progress(console) as show:
            tally = _TableRun(config, wanted, scorer, show).write(reader)
    print_pair_summary(Console(quiet=quiet), config.target, tally, reader.bad_lines, config.choice.threshold)
    return tally


def _check_target(reader: TableReader, config: TableConfig) -> None:
    if config.converts and (obstacle := reader.obstacle()):
        raise ValueError(
            f"output {str(config.target)!r} can't be of another type than input {str(config.source)!r}: {obstacle}; "
            f"name it {config.target.stem + config.source.suffix!r}"
        )


#: Pairs that are scored together, where nothing else is said: a table is opened before there is a model.
_BATCH_SIZE = 64

#: A run of rows, its pairs and their scores, and which are kept.
_Decided = tuple[Rows, Sequence[Pair], PairScores, np.ndarray]


class _TableRun:
    def __init__(self, config: TableConfig, wanted: Wanted, scorer: ClipScorer, show: Callable[[Shown], None]) -> None:
        self._config, self._wanted, self._scorer, self._show = config, wanted, scorer, show
        self._tally = PairTally()

    def write(self, reader: TableReader) -> PairTally:
        """Write the rows that are kept."""
        config = self._config
        decided = self._by_threshold if config.choice.keep_fraction is None else self._by_fraction
        remove_leftovers_of(config.target)
        with publish(config.target) as file, closing(self._writer(reader, file)) as writer:
            for rows, pairs, scores, keep in decided(reader):
                writer.write(rows, keep, scores.similarity)
                self._tally.add(pairs, scores, keep)
            writer.finish()
        return self._tally

    def _writer(self, reader: TableReader, file: BinaryIO) -> TableWriter:
        config = self._config
        if config.converts:
            return converting_writer(reader, file, config.target.suffix.lower(), config.score_key)
        return reader.writer(file)

    def _by_threshold(self, reader: TableReader) -> Iterator[_Decided]:
        threshold = self._config.choice.threshold
        assert threshold is not None
        for (rows, pairs), scores in self._score(reader, threshold):
            yield rows, pairs, scores, scores.keep(threshold)
            self._show(shown(self._tally, reader.done()))

    def _by_fraction(self, reader: TableReader) -> Iterator[_Decided]:
        """Score all rows, and read them once more when it is known which have the highest scores."""
        fraction = self._config.choice.keep_fraction
        assert fraction is not None
        scored, progress = ScoredTable(), PairTally()
        for (_, pairs), scores in self._score(reader, None):
            scored.add(scores)
            progress.add(pairs, scores, np.ones(len(pairs), dtype=bool))
            self._show(shown(progress, reader.done(), decides=False))
        decided = scored.decide(fraction)
        self._tally.cutoff, self._tally.truncated_captions = decided.describe(fraction), decided.num_truncated
        start = 0
        with open_table(self._config.source, self._wanted) as again:
            for rows, pairs in _with_pairs(again):
                scores, keep = decided.between(start, start + len(pairs))
                yield rows, pairs, scores, keep
                start += len(pairs)
        if start != len(decided.keep):
            raise OSError(f"{str(self._config.source)!r} changed while it was read")

    def _score(
        self, reader: TableReader, threshold: float | None
    ) -> Iterator[tuple[tuple[Rows, Sequence[Pair]], PairScores]]:
        config, device = self._config, self._scorer.device
        return score_pairs(
            ((each, each[1]) for each in _with_pairs(reader)),
            Recheck(self._scorer, threshold),
            folder=config.source.parent,
            num_workers=default_num_workers(device) if config.num_workers is None else config.num_workers,
            worker_timeout=config.worker_timeout,
            table=str(config.source),
        )


def _with_pairs(reader: TableReader) -> Iterator[tuple[Rows, Sequence[Pair]]]:
    for rows in reader.read():
        yield rows, [Pair.of_cells(image, caption) for image, caption in zip(rows.images, rows.captions, strict=True)]
