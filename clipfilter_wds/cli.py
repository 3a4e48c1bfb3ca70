"""The commands. Nothing else parses arguments."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, auto_cli
from rich.console import Console

from clipfilter_wds.console import plain
from clipfilter_wds.demo.run import demo
from clipfilter_wds.models.config import DEFAULT_MODEL
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.ranks import DEFAULT_RANK_TIMEOUT
from clipfilter_wds.offline.engines.ray import RayEngine
from clipfilter_wds.offline.progress import run_with_progress
from clipfilter_wds.report.run import ReportConfig, check_page, write_report
from clipfilter_wds.scores.selection import DEFAULT_THRESHOLD
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.tables.config import TableConfig
from clipfilter_wds.tables.run import process_table
from clipfilter_wds.workers.config import DEFAULT_WORKER_TIMEOUT
from clipfilter_wds.workers.crashes import WorkerDiedError
from clipfilter_wds.world import World

ALL_DONE, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def rewrite(
    shards: str | list[str],
    *,
    output: str,
    model: str = DEFAULT_MODEL,
    threshold: float | None = None,
    keep_fraction: float | None = None,
    subset: str | None = None,
    scores: str | None = None,
    samples_per_shard: int | None = None,
    caption: str = "txt",
    report: str | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    cpus_per_task: int | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    **scorer_options: Any,
) -> int:
    """Write shards that hold only the pairs whose caption describes the image.

    Args:
        shards: A path, glob or brace range, several of these separated by commas, or @file.txt; local or fsspec URLs.
        output: Folder to write to. A run that was stopped goes on where it was when started again.
        model: Hugging Face hub id of a CLIP or SigLIP, a folder, open_clip:..., or demo-tiny (knows drawn scenes only).
        threshold: Keep a pair when its cosine similarity, clipped to [0, 1], is at least this; 0.25 when neither
            keep_fraction nor subset is given.
        keep_fraction: Keep this share of all pairs that can be scored, those with the highest scores.
        subset: Keep only what this file lists: a .npy of uids as DataComp's, or a text file of keys, one per line.
        scores: Folder of score tables that were made before; no model is loaded and no image decoded then.
        samples_per_shard: Pack what is kept into shards of this many samples; else each input shard has its output.
        caption: Member that holds the caption (txt), or a field of the json member (json:caption); several
            of these, separated by commas, are several captions of an image.
        report: HTML file to write that shows what was kept and dropped.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; by default as many as suit the device.
        worker_timeout: Seconds that one sample may take to decode; 0 is for ever.
        engine: local does the shards in this process and its workers, ray on a Ray cluster; both write the same.
        ray_address: Of a running Ray cluster (auto: the one of this machine); by default Ray is started here.
        cpus_per_task: Processors of each Ray actor; by default shared out among the GPUs, and 1 without GPUs.
        rank_timeout: Under torchrun or srun, seconds to wait for the other ranks without a sign of progress.
        scorer_options: As of ClipScorer.
    """
    run = _Run(
        world=World.from_env(),
        engine=engine,
        ray_address=ray_address,
        cpus_per_task=cpus_per_task,
        rank_timeout=rank_timeout,
        use_gpus=dict(scorer_options).get("device") != "cpu",
    )
    config = RewriteConfig(
        shards=shards,
        output=output,
        threshold=threshold,
        keep_fraction=keep_fraction,
        subset=subset,
        scores=scores,
        samples_per_shard=samples_per_shard,
        caption=caption,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_timeout=worker_timeout,
    )
    if report is not None:
        check_page(report, of=scores or output)
    code = run(config, lambda: ClipScorer(model, **scorer_options))
    if run.world.rank == 0 and report is not None and (scores or Path(output, "_scores").expanduser().is_dir()):
        write_report(ReportConfig(scores=scores or output, run=output, shards=shards, output=report))
    return code


def score(
    shards: str | list[str],
    *,
    output: str,
    model: str = DEFAULT_MODEL,
    caption: str = "txt",
    batch_size: int = 64,
    num_workers: int | None = None,
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    cpus_per_task: int | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    **scorer_options: Any,
) -> int:
    """Write a table of scores for every shard, and no samples.

    Args:
        shards: A path, glob or brace range, several of these separated by commas, or @file.txt; local or fsspec URLs.
        output: Folder to write to. A run that was stopped goes on where it was when started again.
        model: Hugging Face hub id of a CLIP or SigLIP, a folder, open_clip:..., or demo-tiny (knows drawn scenes only).
        caption: Member that holds the caption (txt), or a field of the json member (json:caption); several
            of these, separated by commas, are several captions of an image.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; by default as many as suit the device.
        worker_timeout: Seconds that one sample may take to decode; 0 is for ever.
        engine: local does the shards in this process and its workers, ray on a Ray cluster; both write the same.
        ray_address: Of a running Ray cluster (auto: the one of this machine); by default Ray is started here.
        cpus_per_task: Processors of each Ray actor; by default shared out among the GPUs, and 1 without GPUs.
        rank_timeout: Under torchrun or srun, seconds to wait for the other ranks without a sign of progress.
        scorer_options: As of ClipScorer.
    """
    run = _Run(
        world=World.from_env(),
        engine=engine,
        ray_address=ray_address,
        cpus_per_task=cpus_per_task,
        rank_timeout=rank_timeout,
        use_gpus=dict(scorer_options).get("device") != "cpu",
    )
    config = ScoreConfig(
        shards=shards,
        output=output,
        caption=caption,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_timeout=worker_timeout,
    )
    return run(config, lambda: ClipScorer(model, **scorer_options))


def table(
    input: str,  # noqa: A002  # the command's argument is called what it is
    *,
    output: str,
    image_key: str = "image",
    caption_key: str = "caption",
    threshold: float = DEFAULT_THRESHOLD,
    score_key: str | None = None,
    model: str = DEFAULT_MODEL,
    batch_size: int = 64,
    num_workers: int | None = None,
    worker_timeout: float = DEFAULT_WORKER_TIMEOUT,
    **scorer_options: Any,
) -> int:
    """Write the rows of a table whose caption describes the image.

    Args:
        input: A .jsonl, .csv, .parquet or .json file. Relative image paths begin in its folder.
        output: File of the same type to write; one that is there is replaced.
        image_key: Column of the images: paths, http(s):// or other fsspec URLs.
        caption_key: Column of the captions.
        threshold: Keep a row when its cosine similarity, clipped to [0, 1], is at least this.
        score_key: Name of a column to add, such as clip_score, that holds the similarity.
        model: Hugging Face hub id of a CLIP or SigLIP, a folder, open_clip:..., or demo-tiny (knows drawn scenes only).
        batch_size: Rows per forward pass.
        num_workers: Processes that open images; by default as many as suit the device.
        worker_timeout: Seconds that one image may take to be read and decoded; 0 is for ever.
        scorer_options: As of ClipScorer.
    """
    config = TableConfig(
        input=input,
        output=output,
        image_key=image_key,
        caption_key=caption_key,
        threshold=threshold,
        score_key=score_key,
        batch_size=batch_size,
        num_workers=num_workers,
        worker_timeout=worker_timeout,
    )
    _refuse_ranks(World.from_env())
    process_table(config, lambda: ClipScorer(model, **scorer_options))
    return ALL_DONE


def report(
    scores: str,
    *,
    output: str,
    shards: str | list[str] | None = None,
    threshold: float | None = None,
    thumbnails: int = 120,
) -> int:
    """Write an HTML page that shows what a threshold keeps: scores, reasons, samples, captions, shards.

    Args:
        scores: The output folder of score or rewrite.
        output: HTML file to write. It holds all that it shows and asks no other host for anything.
        shards: The shards that were scored, for captions and pictures; wherever they are now.
        threshold: Where the slider begins; by default the threshold of the run.
        thumbnails: How many samples to show, at most 200.
    """
    _refuse_ranks(World.from_env())
    write_report(ReportConfig(scores=scores, shards=shards, output=output, threshold=threshold, thumbnails=thumbnails))
    return ALL_DONE


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Where and how the shards of a command are done."""

    world: World
    engine: str
    ray_address: str | None
    cpus_per_task: int | None
    rank_timeout: float
    use_gpus: bool

    def __post_init__(self) -> None:
        if self.engine == "ray":
            _refuse_ranks(self.world)
        elif self.ray_address is not None or self.cpus_per_task is not None:
            raise ValueError("ray_address and cpus_per_task are for --engine ray")

    def __call__(self, config: ScoreConfig, load: Callable[[], ClipScorer]) -> int:
        if self.engine == "ray":
            with RayEngine(
                load, address=self.ray_address, cpus_per_task=self.cpus_per_task, use_gpus=self.use_gpus
            ) as engine:
                failed = run_with_progress(config, load, engine=engine).failed
        else:
            self.world.claim_gpu()
            failed = run_with_progress(config, load, world=self.world, rank_timeout=self.rank_timeout).failed
        # Another rank's failures are in rank zero's summary; an exit code would make torchrun stop all the others.
        return SOME_FAILED if failed and self.world.rank == 0 else ALL_DONE


def _refuse_ranks(world: World) -> None:
    if world.world_size > 1:
        raise ValueError(f"this is rank {world.rank} of {world.world_size}; start the command once, as one process")


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in one line what is wrong, without the whole usage."""
        line = without_secrets(" ".join(message.split()))
        if line.startswith("unrecognized arguments: ") and not line.split()[2].startswith("-"):
            line += "; quote a pattern such as 'data/*.tar', so that the shell does not spread it"
        self.exit(UNUSABLE, f"{self.prog}: {line} (see {self.prog} --help)\n")


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 all done, 1 some shards failed, 2 unusable arguments."""
    try:
        code = auto_cli([demo, rewrite, score, report, table], args=args, parser_class=_Parser, prog="clipfilter-wds")
    except ValueError as error:
        code = _complain(str(error), UNUSABLE)
    except (OSError, WorkerDiedError) as error:
        code = _complain(f"{error}. What was finished is whole; start the same command again to go on", SOME_FAILED)
    except KeyboardInterrupt:
        code = _complain("stopped. What was finished is whole; start the same command again to go on", INTERRUPTED)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    line = without_secrets(" ".join(message.split()))
    Console(stderr=True).print(f"clipfilter-wds: {plain(line)}", highlight=False, soft_wrap=True)
    return code
