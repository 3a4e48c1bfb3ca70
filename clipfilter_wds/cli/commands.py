"""Holds the commands. What one needs beside its configs is imported when it runs, so that help comes at once."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import get_type_hints

from clipfilter_wds.cli.config import LogConfig, ShowConfig
from clipfilter_wds.cli.options import plain_text
from clipfilter_wds.cli.parser import CommandParser
from clipfilter_wds.cli.quick_imports import quick_imports
from clipfilter_wds.console import printable
from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig
from clipfilter_wds.report.config import ReportConfig, RunReportConfig, check_page
from clipfilter_wds.scores.export.config import ExportConfig
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.tables.config import TableConfig

ALL_DONE, SOME_FAILED, UNUSABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PROGRAM = "clipfilter-wds"

_RESUMES = "What was finished is whole; start the same command again to resume"
_BEGINS_ANEW = "Nothing was written; start the same command again"


def demo(config: DemoConfig, show: ShowConfig) -> int:
    """Draw shards with known mistakes, filter them with a tiny CLIP, compare with the truth."""
    with quick_imports():
        from clipfilter_wds.demo.run import run_demo

    run_demo(config, quiet=show.quiet)
    return ALL_DONE


def rewrite(
    config: RewriteConfig,
    scorer: ScorerConfig,
    engine: EngineConfig,
    page: RunReportConfig,
    log: LogConfig,
    show: ShowConfig,
) -> int:
    """Write shards that hold only the pairs whose caption describes the image."""
    if page.report is not None:
        check_page(page.report, of=config.scores or config.output, writes=not config.dry_run)
    code = _process(config, scorer, engine, log, show, reports=page.report is not None)
    if page.report is not None and not config.dry_run:
        _report_on(config, page.report, show)
    return code


def score(config: ScoreConfig, scorer: ScorerConfig, engine: EngineConfig, log: LogConfig, show: ShowConfig) -> int:
    """Write a table of scores for every shard, and no samples."""
    return _process(config, scorer, engine, log, show)


def rescore(config: RescoreConfig, show: ShowConfig) -> int:
    """Derive better scores from score tables and saved embeddings."""
    return _rescore(config, show)


def dedup(config: DedupConfig, show: ShowConfig) -> int:
    """Drop near-duplicate images from score tables, by saved embeddings."""
    _refuse_ranks()
    return _rescore(config, show)


def report(config: ReportConfig, show: ShowConfig) -> int:
    """Write an HTML page that shows what a threshold keeps: scores, reasons, samples."""
    with quick_imports():
        from clipfilter_wds.report.run import describe_lacking, write_report

    _refuse_ranks()
    lacking = describe_lacking(config, write_report(config))
    if lacking is not None:
        _say(lacking, show)
    _say(f"the report is {config.output}", show)
    return ALL_DONE


def export(config: ExportConfig, show: ShowConfig) -> int:
    """Write scores and embeddings as clip-retrieval or DataComp keeps them."""
    from clipfilter_wds.scores.export.run import export as write_export

    _refuse_ranks()
    num_samples, num_shards = write_export(config)
    _say(f"{num_samples:,} samples of {num_shards:,} shards are in {config.folder}", show)
    return ALL_DONE


def table(config: TableConfig, scorer: ScorerConfig, show: ShowConfig) -> int:
    """Write the rows of a table whose caption describes the image."""
    with quick_imports():
        from clipfilter_wds.models.scorer import ClipScorer
        from clipfilter_wds.tables.run import process_table

    _refuse_ranks()
    process_table(config, partial(ClipScorer, **asdict(scorer)), quiet=show.quiet)
    return ALL_DONE


def _process(
    config: ScoreConfig,
    scorer: ScorerConfig,
    engine: EngineConfig,
    log: LogConfig,
    show: ShowConfig,
    *,
    reports: bool = False,
) -> int:
    """Score, and maybe rewrite, the shards. With ``reports``, a report of it is made next."""
    if isinstance(config, RewriteConfig) and config.scores is not None:
        from clipfilter_wds.offline.asked import check_asked
        from clipfilter_wds.scores.folder import fingerprint_of_scores

        if (found := fingerprint_of_scores(config.scores)) is not None:
            check_asked(found, config, scorer)
    if config.dry_run:
        from clipfilter_wds.offline.dry_run import describe_run

        for line in describe_run(config, scorer):
            print(printable(without_secrets(line)))
        return ALL_DONE
    with quick_imports():
        from clipfilter_wds.cli.processing import process

    if engine.engine == "ray" or engine.devices is not None:
        _refuse_ranks("" if engine.devices is None else ", or leave out devices: every rank has one")
    any_failed = process(config, scorer, engine, log_to=log.log_to, quiet=show.quiet, reports=reports)
    return SOME_FAILED if any_failed else ALL_DONE


def _rescore(config: RescoreConfig | DedupConfig, show: ShowConfig) -> int:
    """Make score tables from score tables."""
    with quick_imports():
        from clipfilter_wds.offline.rescoring.progress import run_with_progress
    from clipfilter_wds.world import World

    world = World.from_env()
    world.claim_gpu()
    run_with_progress(config, world=world, quiet=show.quiet)
    return ALL_DONE


def _say(line: str, show: ShowConfig) -> None:
    if not show.quiet:
        print(printable(without_secrets(line)))


def _report_on(config: RewriteConfig, page: str | Path, show: ShowConfig) -> None:
    with quick_imports():
        from clipfilter_wds.report.run import write_report
    from clipfilter_wds.world import World

    scores = config.scores or config.output
    if World.from_env().rank == 0 and (config.scores or Path(scores, "_scores").expanduser().is_dir()):
        write_report(ReportConfig(scores=scores, run=config.output, output=page), config.urls)
        _say(f"the report is {page}", show)


def _refuse_ranks(hint: str = "") -> None:
    from clipfilter_wds.world import World

    world = World.from_env()
    if world.world_size > 1:
        here = f"this is rank {world.rank} of {world.world_size}"
        raise ValueError(f"{here}; start the command once, as one process{hint}")


@dataclass(frozen=True)
class Command:
    """A function that runs a command, given the configs that its parameters ask for.

    Attributes:
        run: The function; returns the exit code. Name and docstring are the command's.
        examples: Calls of it.
        page: The page of the documentation that is about it.
        positional: The option whose ``--name`` may be left out.
        when_stopped: What one who has stopped it is told.
    """

    run: Callable[..., int]
    examples: Sequence[str]
    page: str
    positional: str | None = None
    when_stopped: str = _RESUMES

    @property
    def name(self) -> str:
        """What it is called."""
        return self.run.__name__

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return plain_text(self.run.__doc__ or "")

    @cached_property
    def parser(self) -> CommandParser:
        """Reads its options."""
        configs = [hint for name, hint in get_type_hints(self.run).items() if name != "return"]
        return CommandParser(
            f"{PROGRAM} {self.name}",
            description=self.summary,
            examples=[f"{PROGRAM} {self.name} {example}" for example in self.examples],
            page=self.page,
            configs=configs,
            positional=self.positional,
            owners=_commands_with,
        )


COMMANDS = {
    command.name: command
    for command in (
        Command(demo, ["--output clipfilter_demo"], "README.md"),
        Command(
            rewrite,
            [
                "'data/{00000..00099}.tar' --output kept --threshold 0.28",
                "data --output kept --keep_fraction 0.3 --report kept.html",
                "'data/*.tar' --output kept --scores scores --threshold 0.3 --dry_run",
            ],
            "docs/selection.md",
            "shards",
        ),
        Command(
            score,
            [
                "'data/{00000..00099}.tar' --output scores",
                "data -o scores --embeddings fp16",
                "data -o trial --limit 1000",
            ],
            "docs/selection.md",
            "shards",
        ),
        Command(rescore, ["scores --output better --method neg_clip_loss"], "docs/selection.md", "scores"),
        Command(dedup, ["scores --output distinct --similarity 0.95"], "docs/selection.md", "scores"),
        Command(
            report,
            ["scores --output report.html --shards 'data/*.tar'", "scores -o report.html --threshold 0.3"],
            "docs/threshold.md",
            "scores",
            _BEGINS_ANEW,
        ),
        Command(
            export,
            [
                "scores --format clip_retrieval --output exported",
                "scores --format datacomp --datacomp_model b32 --output exported",
            ],
            "docs/interop.md",
            "scores",
            "Its output is not whole; delete that, and start the same command again",
        ),
        Command(
            table,
            [
                "photos.csv --output kept.csv --score_key clip_score",
                "photos.csv --output kept.parquet --image_key path --caption_key alt_text",
            ],
            "docs/dataflow.md",
            "input",
            _BEGINS_ANEW,
        ),
    )
}


def _commands_with(option: str) -> list[str]:
    """The names of the commands that have an option."""
    return [
        command.name
        for command in COMMANDS.values()
        if any(known.name == option for options in command.parser.groups.values() for known in options)
    ]
