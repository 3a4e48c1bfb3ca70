"""Scores the shards of a run where its options say: in this process, on several devices, or on Ray."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from clipfilter_wds.cli.quick_imports import quick_imports
from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.offline.engines.config import EngineConfig
from clipfilter_wds.offline.progress import run_with_progress
from clipfilter_wds.offline.run_logger import LogTo, RunLogger
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.world import World

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

#: Whoever starts the ranks ends them all when one of them dies.
_NO_TIMEOUT = float("inf")


def process(
    config: ScoreConfig,
    scorer: ScorerConfig,
    engine: EngineConfig,
    *,
    log_to: LogTo | None,
    quiet: bool,
    reports: bool = False,
) -> bool:
    """Score, and maybe rewrite, the shards; whether some failed. With ``reports``, a report of it is made next.

    Another rank's failures are in rank zero's summary; an exit code would make torchrun stop all the others.
    """
    load = partial(_load, scorer)
    settings = {**asdict(config), **asdict(scorer)}
    start_log = None if log_to is None else partial(RunLogger, log_to, config.folder, settings)
    run = partial(run_with_progress, config, load, start_log=start_log, quiet=quiet, reports=reports)
    if engine.engine == "ray":
        from clipfilter_wds.offline.engines.ray import RayEngine

        use_gpus = scorer.device != "cpu"
        with RayEngine(
            load, address=engine.ray_address, cpus_per_task=engine.cpus_per_task, use_gpus=use_gpus
        ) as actors:
            return bool(run(engine=actors).failed)
    if engine.devices is not None:
        from clipfilter_wds.offline.engines.devices import num_processes, run_on_devices

        num = num_processes(engine.devices, scorer.device)
        if num > 1:
            if config.overwrite:
                raise ValueError("overwrite is for one process; leave out devices, or choose another folder")
            return run_on_devices(num, partial(_run_share, run))
    world = World.from_env()
    world.claim_gpu()
    return bool(run(world=world, rank_timeout=engine.rank_timeout).failed) and world.rank == 0


def _load(config: ScorerConfig) -> "ClipScorer":
    with quick_imports():  # for two seconds, which a run that has score tables does without
        from clipfilter_wds.models.scorer import ClipScorer
    return ClipScorer(**asdict(config))


def _run_share(run: Callable[..., Tally], world: World, board: Board) -> bool:
    world.claim_gpu()
    return bool(run(world=world, board=board, rank_timeout=_NO_TIMEOUT).failed)
