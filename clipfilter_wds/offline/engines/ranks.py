"""Shares out a run among ranks. Rank zero waits for the marks of all; no network connects them.

A rank may start late, die, or be started again: what counts is what the output holds.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from clipfilter_wds.offline.commit import AnyTask, Task, read_marks
from clipfilter_wds.offline.engines.board import Board
from clipfilter_wds.offline.tally import OnProgress, Phase, Tally
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish_json
from clipfilter_wds.types import ShardError
from clipfilter_wds.world import World

_NOTE_SUFFIX = ".failed"
_LOOK_SECONDS = 1.0
_MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks that share a run, seen from one of them.

    What the folder holds when they are made is what an earlier run has done, so rank zero makes them before it does
    anything that takes time, such as loading a model: another one may be faster.

    Attributes:
        folder: The output folder, which all of them must see.
        world: This rank among all.
        timeout: Seconds that a rank waits for the others without any change in the folder.
        board: Tells when the others are done; None where they share no memory, and only the folder tells.
        before: The files of the folder when the run began; none for one rank, which looks at the marks alone.
    """

    folder: AnyPath
    world: World
    timeout: float
    board: Board | None = None
    before: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", self._present() if self.world.world_size > 1 else frozenset())

    def run(self, tasks: Sequence[AnyTask], do: Callable[[Sequence[AnyTask]], Tally], on_progress: OnProgress) -> Tally:
        """Do this rank's share; on rank zero, then wait for the others.

        Args:
            tasks: Of all ranks.
            do: Does those of some tasks that have no mark yet.
            on_progress: Told how far all ranks are while this one waits.

        Returns:
            The totals of all on rank zero, of its share on another.

        Raises:
            TimeoutError: When the others make no progress; it names what is missing, and whose it is.
        """
        if self.world.world_size == 1:
            return do(tasks)
        own = self._do_share(tasks, do)
        return own if self.world.rank else self._sum_up(tasks, do, own, on_progress)

    def run_together(
        self, tasks: Sequence[AnyTask], do: Callable[[Sequence[AnyTask]], Tally], on_progress: OnProgress
    ) -> Tally:
        """Do this rank's share and wait for the others, on every rank; the totals are those of the share.

        What failed on any rank is in ``failed`` of all.

        Raises:
            TimeoutError: As :meth:`run`.
        """
        if self.world.world_size == 1:
            return do(tasks)
        own = self._do_share(tasks, do)
        self._wait(tasks, own, on_progress)
        own.failed |= {public_url(task.url): why for task in tasks if (why := _read_note(task)) is not None}
        return own

    def _do_share(self, tasks: Sequence[AnyTask], do: Callable[[Sequence[AnyTask]], Tally]) -> Tally:
        # Every world_size-th, so that early and late shards are spread over all ranks.
        mine = tasks[self.world.rank :: self.world.world_size]
        for task in mine:
            if str(note := _note_of(task)) in self.before:
                note.unlink(missing_ok=True)  # of an earlier run
        own = do(mine)
        for task in mine:
            if why := own.failed.get(public_url(task.url)):
                publish_json(_note_of(task), {"shard": public_url(task.url), "why": why})
        if self.board is not None:
            self.board.end_share(self.world.rank)
        return own

    def _sum_up(
        self,
        tasks: Sequence[AnyTask],
        do: Callable[[Sequence[AnyTask]], Tally],
        own: Tally,
        on_progress: OnProgress,
    ) -> Tally:
        left: list[AnyTask] = []
        while True:
            self._wait(tasks, own, on_progress)
            tally, left = _total(tasks, self.before, own)
            if all(_note_of(task).is_file() for task in left) or self._have_all_ended():
                break
            time.sleep(_LOOK_SECONDS)  # a mark was that of a shard that has changed since; its rank will do it again
        # A note may be of an earlier run, or the trouble over: try once more before giving up.
        failed = {**own.failed, **tally.failed}
        failed |= do([task for task in left if public_url(task.url) not in failed]).failed
        tally, left = _total(tasks, self.before, own)
        for task in left:
            tally.fail(task.url, failed.get(public_url(task.url), "it got no outcome"))
        for path in self.folder.rglob(f"*{_NOTE_SUFFIX}"):
            path.unlink(missing_ok=True)
        return tally

    def _wait(self, tasks: Sequence[Task], own: Tally, on_progress: OnProgress) -> None:
        """Wait until every shard has a mark or a note, or nobody is left who would write one."""
        seen, changed = frozenset[str](), time.monotonic()
        while True:
            began = time.monotonic()
            have_all_ended = self._have_all_ended()  # asked first, so that all that they wrote is found
            present = self._present()
            missing = [number for number, task in enumerate(tasks) if not _is_settled(task, present)]
            if not missing or have_all_ended:
                return
            tally = Tally(num_shards=len(tasks), phase=Phase.WAITING, started=own.started)
            tally.done = len(tasks) - len(missing)
            on_progress(tally)
            if present != seen:
                seen, changed = present, time.monotonic()
            elif time.monotonic() - changed > self.timeout:
                raise TimeoutError(self._what_is_missing(tasks, missing))
            # A folder of millions of files is not to be listed all the time.
            time.sleep(max(_LOOK_SECONDS, 10 * (time.monotonic() - began)))

    def _have_all_ended(self) -> bool:
        """Whether the others are known to be done. What has no mark then is lost, or its shard has changed."""
        return self.board is not None and self.board.have_all_ended(self.world.rank)

    def _present(self) -> frozenset[str]:
        return frozenset(str(path) for path in self.folder.rglob("*"))

    def _what_is_missing(self, tasks: Sequence[Task], missing: list[int]) -> str:
        size = self.world.world_size
        ranks = ", ".join(map(str, sorted({number % size for number in missing})))
        named = ", ".join(public_url(tasks[number].url) for number in missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        return (
            f"nothing has changed in the output for {self.timeout:g} s, and {len(missing)} of {len(tasks)} shards "
            f"have no outcome: {named}{more}. They are the share of rank {ranks} of {size}; is it running?"
        )


def _note_of(task: Task) -> AnyPath:
    """Beside the place of the mark: that there will be none, and why."""
    return task.mark.parent / f"{task.mark.name}{_NOTE_SUFFIX}"


def _read_note(task: Task) -> str | None:
    """Why a shard failed that has no mark, as its rank noted it for the others."""
    note = _note_of(task)
    return json.loads(note.read_bytes())["why"] if note.is_file() and not task.mark.is_file() else None


def _is_settled(task: Task, present: frozenset[str]) -> bool:
    return str(task.mark) in present or str(_note_of(task)) in present


def _total(tasks: Sequence[AnyTask], before: frozenset[str], own: Tally) -> tuple[Tally, list[AnyTask]]:
    """What all ranks have done, and the shards that have no mark.

    Every shard that got its mark since counts as scored, also one whose table an earlier run had left.
    """
    tally = Tally(num_shards=len(tasks), phase=own.phase, started=own.started)
    left = []
    for task, stats in read_marks(tasks):
        if isinstance(stats, ShardError):
            tally.fail(task.url, str(stats))
            continue
        if stats is None:
            left.append(task)
            continue
        tally.add(stats)
        if str(task.mark) in before:
            tally.resumed += 1
        elif own.phase is Phase.COPYING:
            tally.num_copied += stats.counts.seen
        else:
            tally.num_scored += stats.counts.seen
    return tally, left
