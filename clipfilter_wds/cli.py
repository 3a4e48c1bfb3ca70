"""The commands. Nothing else parses arguments."""

import sys
from collections.abc import Callable
from typing import NoReturn

from jsonargparse import ArgumentParser, auto_cli
from rich.console import Console
from rich.markup import escape

from clipfilter_wds.demo.run import demo
from clipfilter_wds.progress import run_with_progress
from clipfilter_wds.rewrite import RewriteConfig, ScoreConfig
from clipfilter_wds.scorer import DEFAULT_MODEL, ClipScorer, Precision
from clipfilter_wds.selection import DEFAULT_THRESHOLD
from clipfilter_wds.world import World

ALL_DONE, SOME_FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def rewrite(
    shards: str | list[str],
    *,
    output: str,
    model: str = DEFAULT_MODEL,
    revision: str | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    caption: str = "txt",
    batch_size: int = 64,
    num_workers: int | None = None,
    precision: Precision = "auto",
    device: str = "auto",
) -> int:
    """Write shards that hold only the pairs whose caption describes the image.

    Args:
        shards: A path, glob or brace range, several of these separated by commas, or @file.txt; local or fsspec URLs.
        output: Folder to write to. A run that was stopped goes on where it was when started again.
        model: Hugging Face hub id of a CLIP, a local folder, or demo-tiny (bundled; knows drawn scenes only).
        revision: Branch, tag or commit of a hub model.
        threshold: Keep a pair when its cosine similarity, clipped to [0, 1], is at least this.
        caption: Member that holds the caption (txt), or a field of the json member (json:caption).
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; by default as many as suit the device.
        precision: Arithmetic of the forward pass; auto is the fastest whose decisions equal fp32's.
        device: auto, cpu, cuda or cuda:1.
    """
    config = RewriteConfig(
        shards=shards,
        output=output,
        threshold=threshold,
        caption=caption,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    return _run(config, lambda: ClipScorer(model, revision=revision, device=device, precision=precision))


def score(
    shards: str | list[str],
    *,
    output: str,
    model: str = DEFAULT_MODEL,
    revision: str | None = None,
    caption: str = "txt",
    batch_size: int = 64,
    num_workers: int | None = None,
    precision: Precision = "auto",
    device: str = "auto",
) -> int:
    """Write a table of scores for every shard, and no samples.

    Args:
        shards: A path, glob or brace range, several of these separated by commas, or @file.txt; local or fsspec URLs.
        output: Folder to write to. A run that was stopped goes on where it was when started again.
        model: Hugging Face hub id of a CLIP, a local folder, or demo-tiny (bundled; knows drawn scenes only).
        revision: Branch, tag or commit of a hub model.
        caption: Member that holds the caption (txt), or a field of the json member (json:caption).
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; by default as many as suit the device.
        precision: Arithmetic of the forward pass; auto is the fastest whose decisions equal fp32's.
        device: auto, cpu, cuda or cuda:1.
    """
    config = ScoreConfig(shards=shards, output=output, caption=caption, batch_size=batch_size, num_workers=num_workers)
    return _run(config, lambda: ClipScorer(model, revision=revision, device=device, precision=precision))


def _run(config: ScoreConfig, load: Callable[[], ClipScorer]) -> int:
    world = World.from_env()
    if world.world_size > 1:
        raise ValueError(
            f"this is rank {world.rank} of {world.world_size}, but shards are processed by one process yet"
        )
    return SOME_FAILED if run_with_progress(config, load).failed else ALL_DONE


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in one line what is wrong, without the whole usage."""
        line = " ".join(message.split())
        self.exit(UNUSABLE, f"{self.prog}: {line} (see {self.prog} --help)\n")


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 all done, 1 some shards failed, 2 unusable arguments."""
    try:
        code = auto_cli([demo, rewrite, score], args=args, parser_class=_Parser, prog="clipfilter-wds")
    except ValueError as error:
        code = _complain(str(error), UNUSABLE)
    except OSError as error:
        code = _complain(f"{error}. What was finished is whole; start the same command again to go on", SOME_FAILED)
    except KeyboardInterrupt:
        code = _complain("stopped. What was finished is whole; start the same command again to go on", INTERRUPTED)
    sys.exit(code)


def _complain(message: str, code: int) -> int:
    Console(stderr=True).print(f"clipfilter-wds: {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)
    return code
