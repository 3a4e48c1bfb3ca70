"""Resumes from the states of a run's ranks, on as many ranks and workers as there are now."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.training.config import End, LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.types import FilterStats

_log = logging.getLogger(__name__)


def states_in(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One state, or several, as a list.

    Raises:
        TypeError: When one is no state of a loader.
    """
    states = [given] if isinstance(given, Mapping) or not isinstance(given, Sequence) else list(given)
    for state in states:
        if not isinstance(state, Mapping):
            raise TypeError(f"a state is a {type(state).__name__}; it has to be what a loader's state_dict() gave")
        if not {"version", "settings"} <= state.keys():
            raise TypeError(
                f"this is no state of a loader: it holds {sorted(map(str, state))}. Give what the loader's state_dict()"
                " gave, taken out of what it was saved in"
            )
    return states


def settings_of(
    dataset: ClipWebDataset, config: LoaderConfig, score_batch_size: int, fingerprint: Fingerprint
) -> dict[str, Any]:
    """All that the order of the kept samples depends on, but for ranks and workers."""
    names = "\n".join(public_url(url) for url in dataset.urls)
    return {
        "dataset": f"{len(dataset.urls)} shards, {sha256(names.encode()).hexdigest()[:12]}",
        "shuffle": dataset.shuffle,
        "seed": dataset.seed,
        "threshold": config.threshold,
        "batch_size": config.batch_size,
        "score_batch_size": score_batch_size,
        "end": config.end,
        "num_streams": config.num_streams,
        **dataset.layout.fingerprint,
        **{name: value for name, value in fingerprint.items() if name != "model"},
    }


def check_settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse a state that was saved with other settings.

    Args:
        here: The loader's settings.
        there: Those in the state.

    Raises:
        ValueError: With both values.
    """
    differences = [
        f"{name} is {here[name]!r} here and {there.get(name)!r} in the state"
        for name in here
        if here[name] != there.get(name)
    ]
    if differences:
        raise ValueError("can't resume from this state: " + "; ".join(differences))


def check_streams(state: LoaderState, end: End) -> None:
    """See that each rank has a stream to read in what is left of the epoch.

    Raises:
        ValueError: When one has none, and the epoch never ends.
    """
    topology = state.progress.topology
    if topology.num_streams >= topology.world_size or state.is_beginning:
        return
    said = f"the state has num_streams={topology.num_streams}, too few for {topology.world_size} ranks"
    if end == "repeat":
        raise ValueError(f"{said}; resume on fewer, and give num_streams where training begins")
    if topology.rank == 0:
        _log.warning("%s: what is left of this epoch is left over; the next one is split anew", said)


def share_out(states: Sequence[LoaderState], topology: Topology) -> LoaderState:
    """The state of a rank, from those of all ranks that were there when they were saved, or from its own.

    Args:
        states: Of one moment. One alone is enough for the same rank of as many.
        topology: This rank and its workers; how it would split an epoch does not matter.

    Raises:
        ValueError: When streams are missing or come twice, or the states are of different moments.
    """
    if not states:
        raise ValueError("there is no state in the list")
    states = sorted(states, key=lambda state: state.progress.topology.rank)
    first = states[0]
    there = first.progress.topology
    _check_are_of_one_moment(states)
    here = replace(topology, num_streams=there.num_streams, num_groups=there.num_groups)
    mine = [state for state in states if state.progress.topology.is_same_rank(here)]
    if len(states) == 1 and mine:
        return _moved(mine[0], here)
    _check_is_whole(states, there)
    if mine:
        return _moved(mine[0], here)
    streams = {stream: one for state in states for stream, one in state.progress.streams.items()}
    progress = Progress(
        topology=here,
        streams={stream: streams[stream] for stream in here.streams},
        stats=sum((state.progress.stats for state in states[here.rank :: here.world_size]), start=FilterStats()),
    )
    return replace(first, progress=progress)


def _moved(state: LoaderState, topology: Topology) -> LoaderState:
    """The state for as many workers as there are now."""
    progress = state.progress
    is_same = progress.topology == topology
    next_worker = progress.next_worker if is_same else 0
    return replace(state, progress=replace(progress, topology=topology, next_worker=next_worker))


def _check_are_of_one_moment(states: Sequence[LoaderState]) -> None:
    moments = {_moment(state) for state in states}
    if len(moments) > 1:
        raise ValueError(
            f"the states are of different moments ({'; '.join(sorted(moments))}); save those of all ranks after the "
            "same batch"
        )


def _moment(state: LoaderState) -> str:
    topology = state.progress.topology
    ranks = f"{topology.world_size} ranks and {topology.num_streams} streams"
    return f"epoch {state.epoch} after {state.batches} batches, with {ranks}"


def _check_is_whole(states: Sequence[LoaderState], topology: Topology) -> None:
    found = [stream for state in states for stream in state.progress.streams]
    if sorted(found) != list(range(topology.num_streams)):
        ranks = ", ".join(str(state.progress.topology.rank) for state in states)
        raise ValueError(
            f"can't resume from the state of rank {ranks} of {topology.world_size}: another rank, or another number of "
            "ranks, takes a list of the states of all of them, each once"
        )
