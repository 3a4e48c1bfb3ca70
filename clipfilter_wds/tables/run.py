"""Runs over a table: reads rows, scores their pairs, and writes the rows that are kept."""

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from transformers.utils import logging

from clipfilter_wds.console import Shown, show_progress
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.storage.publish import publish, remove_leftovers_of
from clipfilter_wds.tables.config import TableConfig
from clipfilter_wds.tables.formats.open import open_table
from clipfilter_wds.tables.formats.rows import Rows, TableReader, Wanted
from clipfilter_wds.tables.progress import print_pair_summary, shown
from clipfilter_wds.tables.scoring import Pair, score_pairs
from clipfilter_wds.tables.tally import PairTally
from clipfilter_wds.workers.cpus import default_num_workers


def process_table(config: TableConfig, load_scorer: Callable[[], ClipScorer]) -> PairTally:
    """Write the rows of a table whose caption describes the image, and show how far the run is and what came of it.

    Kept rows are written in order and unchanged. Memory holds a few batches of rows, whatever the size of the table
    (except for a ``.json`` array, which is held whole).

    Args:
        config: What to read and write.
        load_scorer: Loads the model; not called when the table can't be used.

    Returns:
        What became of the rows.

    Raises:
        ValueError: When the table can't be read or lacks a column.
        OSError: When the output can't be written.
        WorkerDiedError: When worker processes die one after another.
    """
    logging.disable_progress_bar()
    console = Console(stderr=True)
    wanted = Wanted(
        image_key=config.image_key,
        caption_key=config.caption_key,
        score_key=config.score_key,
        num_rows=config.batch_size,
    )
    with open_table(config.source, wanted) as reader:
        with console.status("loading the model"):
            scorer = load_scorer()
        with show_progress(console) as show:
            tally = _filter_rows(reader, config, scorer, show)
    print_pair_summary(Console(), tally, reader.bad_lines)
    return tally


def _filter_rows(
    reader: TableReader, config: TableConfig, scorer: ClipScorer, show: Callable[[Shown], None]
) -> PairTally:
    tally = PairTally()
    num_workers = default_num_workers(scorer.device) if config.num_workers is None else config.num_workers
    recheck = Recheck(scorer, config.threshold)
    scored = score_pairs(
        _with_pairs(reader),
        recheck,
        folder=config.source.parent,
        num_workers=num_workers,
        worker_timeout=config.worker_timeout,
        table=str(config.source),
    )
    remove_leftovers_of(config.target)
    with publish(config.target) as file:
        writer = reader.writer(file)
        for (rows, pairs), scores in scored:
            keep = scores.keep(config.threshold)
            writer.write(rows, keep, scores.similarity)
            tally.add(pairs, scores, keep)
            show(shown(tally, reader.done()))
        writer.finish()
    return tally


def _with_pairs(reader: TableReader) -> Iterator[tuple[tuple[Rows, Sequence[Pair]], Sequence[Pair]]]:
    for rows in reader.read():
        pairs = [Pair.of_cells(image, caption) for image, caption in zip(rows.images, rows.captions, strict=True)]
        yield (rows, pairs), pairs
