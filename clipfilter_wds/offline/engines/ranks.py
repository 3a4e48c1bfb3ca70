"""Several ranks on one output: each does its share, and rank zero waits for the marks of all. No network connects them.

A rank may start late, die, or be started again: what counts is what the output holds.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clipfilter_wds.offline.commit import Marked, read_marks
from clipfilter_wds.offline.engines.local import OnProgress
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish_json
from clipfilter_wds.types import ShardError
from clipfilter_wds.world import World

DEFAULT_RANK_TIMEOUT = 1800.0
_NOTE_SUFFIX = ".failed"
_LOOK_SECONDS = 1.0
_MAX_NAMED = 5

AnyOutput = TypeVar("AnyOutput", bound=Marked)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The ranks that share a run, seen from one of them.

    Attributes:
        folder: The output folder, which all of them must see.
        world: This rank among all.
        timeout: Seconds that a rank waits for the others without any change in the folder.
        on_progress: Told how far all ranks are while rank zero waits.
    """

    folder: AnyPath
    world: World
    timeout: float
    on_progress: OnProgress

    def run(
        self, outputs: Sequence[AnyOutput], fingerprint: Fingerprint, do: Callable[[Sequence[AnyOutput]], Tally]
    ) -> Tally:
        """Do this rank's share; on rank zero, then wait for the others.

        Args:
            outputs: Of all ranks.
            fingerprint: What the scores depend on beside the shards.
            do: Does shards that have no mark yet.

        Returns:
            The totals of all on rank zero, of its share on another.

        Raises:
            TimeoutError: When the others don't go on; it names what is missing, and whose it is.
        """
        if self.world.world_size == 1:
            return do(outputs)
        before = self._present()
        own = self._do_share(outputs, do, before)
        return own if self.world.rank else self._sum_up(outputs, fingerprint, do, own, before)

    def run_together(self, outputs: Sequence[AnyOutput], do: Callable[[Sequence[AnyOutput]], Tally]) -> Tally:
        """Do this rank's share and wait for the others, on every rank; the totals are those of the share.

        What failed on any rank is in ``failed`` of all.

        Raises:
            TimeoutError: As :meth:`run`.
        """
        if self.world.world_size == 1:
            return do(outputs)
        own = self._do_share(outputs, do, self._present())
        self._wait(outputs, own)
        own.failed |= {public_url(output.url): why for output in outputs if (why := _read_note(output)) is not None}
        return own

    def _do_share(
        self, outputs: Sequence[AnyOutput], do: Callable[[Sequence[AnyOutput]], Tally], before: frozenset[str]
    ) -> Tally:
        # Every world_size-th, so that early and late shards are spread over all ranks.
        mine = outputs[self.world.rank :: self.world.world_size]
        for output in mine:
            if str(note := _note_of(output)) in before:
                note.unlink(missing_ok=True)  # of an earlier run
        own = do(mine)
        for output in mine:
            if why := own.failed.get(public_url(output.url)):
                publish_json(_note_of(output), {"shard": public_url(output.url), "why": why})
        return own

    def _sum_up(
        self,
        outputs: Sequence[AnyOutput],
        fingerprint: Fingerprint,
        do: Callable[[Sequence[AnyOutput]], Tally],
        own: Tally,
        before: frozenset[str],
    ) -> Tally:
        left: list[AnyOutput] = []
        while True:
            self._wait(outputs, own)
            tally, left = _total(outputs, fingerprint, before, own)
            if all(_note_of(output).is_file() for output in left):
                break  # else a mark was that of a shard that has changed since, and its rank will do it again
        # A note may be of an earlier run, or the trouble over: try once more before giving up.
        failed = {**own.failed, **tally.failed}
        failed |= do([output for output in left if public_url(output.url) not in failed]).failed
        tally, left = _total(outputs, fingerprint, before, own)
        for output in left:
            tally.fail(output.url, failed.get(public_url(output.url), "it got no outcome"))
        for path in self.folder.rglob(f"*{_NOTE_SUFFIX}"):
            path.unlink(missing_ok=True)
        return tally

    def _wait(self, outputs: Sequence[Marked], own: Tally) -> None:
        """Wait until every shard has a mark or a note."""
        seen, changed = frozenset[str](), time.monotonic()
        while True:
            began = time.monotonic()
            present = self._present()
            missing = [number for number, output in enumerate(outputs) if not _is_settled(output, present)]
            if not missing:
                return
            tally = Tally(num_shards=len(outputs), phase="waiting for the other ranks", started=own.started)
            tally.done = len(outputs) - len(missing)
            self.on_progress(tally)
            if present != seen:
                seen, changed = present, time.monotonic()
            elif time.monotonic() - changed > self.timeout:
                raise TimeoutError(self._what_is_missing(outputs, missing))
            # A folder of millions of files is not to be listed all the time.
            time.sleep(max(_LOOK_SECONDS, 10 * (time.monotonic() - began)))

    def _present(self) -> frozenset[str]:
        return frozenset(str(path) for path in self.folder.rglob("*"))

    def _what_is_missing(self, outputs: Sequence[Marked], missing: list[int]) -> str:
        size = self.world.world_size
        ranks = ", ".join(map(str, sorted({number % size for number in missing})))
        named = ", ".join(public_url(outputs[number].url) for number in missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        return (
            f"nothing has changed in the output for {self.timeout:g} s, and {len(missing)} of {len(outputs)} shards "
            f"have no outcome: {named}{more}. They are the share of rank {ranks} of {size}; is it running?"
        )


def _note_of(output: Marked) -> AnyPath:
    """Beside the place of the mark: that there will be none, and why."""
    return output.mark.parent / f"{output.mark.name}{_NOTE_SUFFIX}"


def _read_note(output: Marked) -> str | None:
    """Why a shard failed that has no mark, as its rank noted it for the others."""
    note = _note_of(output)
    return json.loads(note.read_bytes())["why"] if note.is_file() and not output.mark.is_file() else None


def _is_settled(output: Marked, present: frozenset[str]) -> bool:
    return str(output.mark) in present or str(_note_of(output)) in present


def _total(
    outputs: Sequence[AnyOutput], fingerprint: Fingerprint, before: frozenset[str], own: Tally
) -> tuple[Tally, list[AnyOutput]]:
    """What all ranks have done, and the shards that have no mark."""
    tally = Tally(num_shards=len(outputs), phase=own.phase, started=own.started)
    left = []
    for output, stats in read_marks(outputs, fingerprint):
        if isinstance(stats, ShardError):
            tally.fail(output.url, str(stats))
            continue
        if stats is None:
            left.append(output)
            continue
        tally.add(stats)
        if str(output.mark) in before:
            tally.resumed += 1
        elif own.phase == "copying":
            tally.num_copied += stats.counts.seen
        else:
            tally.num_scored += stats.counts.seen
    return tally, left
