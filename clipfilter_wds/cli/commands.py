"""Runs the commands. What a command needs beside its configs is imported when it runs, so that help comes at once."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NoReturn, get_type_hints

from clipfilter_wds.cli.options import plain_text
from clipfilter_wds.cli.parser import CommandParser
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
from clipfilter_wds.version import __version__

ALL_DONE, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
_PROGRAM = "clipfilter-wds"
_RESUME = "What was finished is whole; start the same command again to resume"


def demo(config: DemoConfig) -> int:
    """Draw shards with known mistakes, filter them with a tiny CLIP, compare with the truth."""
    from clipfilter_wds.demo.run import run_demo

    run_demo(config)
    return ALL_DONE


def rewrite(config: RewriteConfig, scorer: ScorerConfig, engine: EngineConfig, page: RunReportConfig) -> int:
    """Write shards that hold only the pairs whose caption describes the image."""
    if page.report is not None:
        check_page(page.report, of=config.scores or config.output)
    code = _process(config, scorer, engine)
    if page.report is not None:
        _report_on(config, page.report)
    return code


def score(config: ScoreConfig, scorer: ScorerConfig, engine: EngineConfig) -> int:
    """Write a table of scores for every shard, and no samples."""
    return _process(config, scorer, engine)


def rescore(config: RescoreConfig) -> int:
    """Derive better scores from score tables and saved embeddings."""
    return _rescore(config)


def dedup(config: DedupConfig) -> int:
    """Drop near-duplicate images from score tables, by saved embeddings."""
    _refuse_ranks()
    return _rescore(config)


def report(config: ReportConfig) -> int:
    """Write an HTML page that shows what a threshold keeps: scores, reasons, samples."""
    from clipfilter_wds.report.run import write_report

    _refuse_ranks()
    write_report(config)
    return ALL_DONE


def export(config: ExportConfig) -> int:
    """Write scores and embeddings as clip-retrieval or DataComp keeps them."""
    from clipfilter_wds.scores.export.run import export as write_export

    _refuse_ranks()
    num_samples, num_shards = write_export(config)
    print(printable(f"{num_samples:,} samples of {num_shards:,} shards are in {config.folder}"))
    return ALL_DONE


def table(config: TableConfig, scorer: ScorerConfig) -> int:
    """Write the rows of a table whose caption describes the image."""
    from clipfilter_wds.models.scorer import ClipScorer
    from clipfilter_wds.tables.run import process_table

    _refuse_ranks()
    process_table(config, partial(ClipScorer, **asdict(scorer)))
    return ALL_DONE


def _process(config: ScoreConfig, scorer: ScorerConfig, engine: EngineConfig) -> int:
    """Score, and maybe rewrite, the shards."""
    from clipfilter_wds.models.scorer import ClipScorer
    from clipfilter_wds.offline.engines.ray import RayEngine
    from clipfilter_wds.offline.progress import run_with_progress
    from clipfilter_wds.world import World

    world, load = World.from_env(), partial(ClipScorer, **asdict(scorer))
    if engine.engine == "ray":
        _refuse_ranks()
        use_gpus = scorer.device != "cpu"
        with RayEngine(
            load, address=engine.ray_address, cpus_per_task=engine.cpus_per_task, use_gpus=use_gpus
        ) as actors:
            failed = run_with_progress(config, load, engine=actors).failed
    else:
        world.claim_gpu()
        failed = run_with_progress(config, load, world=world, rank_timeout=engine.rank_timeout).failed
    # Another rank's failures are in rank zero's summary; an exit code would make torchrun stop all the others.
    return SOME_FAILED if failed and world.rank == 0 else ALL_DONE


def _rescore(config: RescoreConfig | DedupConfig) -> int:
    """Make score tables from score tables."""
    from clipfilter_wds.offline.rescoring.progress import run_with_progress
    from clipfilter_wds.world import World

    world = World.from_env()
    world.claim_gpu()
    run_with_progress(config, world=world)
    return ALL_DONE


def _report_on(config: RewriteConfig, page: str | Path) -> None:
    from clipfilter_wds.report.run import write_report
    from clipfilter_wds.world import World

    scores = config.scores or config.output
    if World.from_env().rank == 0 and (config.scores or Path(scores, "_scores").expanduser().is_dir()):
        write_report(ReportConfig(scores=scores, run=config.output, output=page), config.urls)


def _refuse_ranks() -> None:
    from clipfilter_wds.world import World

    world = World.from_env()
    if world.world_size > 1:
        raise ValueError(f"this is rank {world.rank} of {world.world_size}; start the command once, as one process")


@dataclass(frozen=True)
class Command:
    """A function that runs a command, given the configs that its parameters ask for.

    Attributes:
        run: The function; returns the exit code. Name and docstring are the command's.
        example: A call of it.
        positional: The option whose ``--name`` may be left out.
    """

    run: Callable[..., int]
    example: str
    positional: str | None = None

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
            f"{_PROGRAM} {self.name}",
            description=self.summary,
            example=f"{_PROGRAM} {self.name} {self.example}",
            configs=configs,
            positional=self.positional,
        )


COMMANDS = {
    command.name: command
    for command in (
        Command(demo, "--output clipfilter_demo"),
        Command(rewrite, "'data/{00000..00099}.tar' --output kept --threshold 0.28", "shards"),
        Command(score, "'data/{00000..00099}.tar' --output scores", "shards"),
        Command(rescore, "scores --output better --method neg_clip_loss", "scores"),
        Command(dedup, "scores --output distinct --similarity 0.95", "scores"),
        Command(report, "scores --output report.html --shards 'data/*.tar'", "scores"),
        Command(export, "scores --format clip_retrieval --output exported", "scores"),
        Command(table, "photos.csv --output kept.csv --score_key clip_score", "input"),
    )
}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 all done, 1 some shards failed, 2 unusable arguments, 130 interrupted."""
    args = sys.argv[1:] if args is None else args
    command = COMMANDS.get(args[0]) if args else None
    sys.exit(_run(command, args[1:]) if command else _overview(args))


def _overview(args: Sequence[str]) -> int:
    """Answer what names no command."""
    if args and args[0] in ("-h", "--help"):
        commands = "\n".join(f"  {command.name:<8} {command.summary}" for command in COMMANDS.values())
        print(
            f"usage: {_PROGRAM} COMMAND [options]\n\nFilter image-caption shards by CLIP similarity.\n\n"
            f"commands:\n{commands}\n\n"
            f"{_PROGRAM} rewrite --help explains the options of rewrite; {_PROGRAM} --version prints the version."
        )
        return ALL_DONE
    if args and args[0] == "--version":
        print(f"{_PROGRAM} {__version__}")
        return ALL_DONE
    found = f"{args[0]!r} is no command" if args else "no command is given"
    return _complain(f"{found}; use one of {', '.join(COMMANDS)} (see {_PROGRAM} --help)", UNUSABLE)


def _run(command: Command, args: Sequence[str]) -> int:
    """Run a command with these arguments."""
    if {"-h", "--help"} & set(args):
        command.parser.print_help()
        return ALL_DONE
    try:
        return command.run(*command.parser.read(args))
    except ValueError as error:
        return _complain(str(error), UNUSABLE)
    except KeyboardInterrupt:
        return _complain(f"stopped. {_RESUME}", INTERRUPTED)
    except Exception as error:
        from clipfilter_wds.workers.crashes import WorkerError

        if not isinstance(error, (OSError, WorkerError)):
            raise
        return _complain(f"{error}. {_RESUME}", SOME_FAILED)


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"{_PROGRAM}: {printable(without_secrets(' '.join(message.split())))}\n")
    return code
