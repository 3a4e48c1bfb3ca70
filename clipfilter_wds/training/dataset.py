"""Streams shards in batches for training, read and decoded in worker processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from clipfilter_wds.options import plain
from clipfilter_wds.preprocess.clip import ClipPreprocess
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.shards.urls import MissingShardError, expand_shards
from clipfilter_wds.training.batches import (
    BatchSettings,
    ImageTransform,
    StreamBatch,
    StreamBatchBuilder,
    TextTransform,
)
from clipfilter_wds.training.member_columns import MemberColumns, SampleTransform
from clipfilter_wds.training.precomputed import ScoreLookup, no_scores
from clipfilter_wds.training.stream import (
    PartEnd,
    Position,
    ShardFailure,
    StreamOrder,
    StreamProgress,
    StreamSample,
    read_stream,
)
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.training.turns import StreamReader, take_turns
from clipfilter_wds.workers.crashes import CrashTracker, WorkerTracker
from clipfilter_wds.world import World


class ClipWebDataset(IterableDataset[StreamBatch]):
    """Streams image-caption pairs from shards: read, decoded, prepared for CLIP and for training, not yet filtered.

    Give it to a ``ClipFilterLoader``, which runs it in workers and drops the pairs that CLIP finds to be mismatched.

    Args:
        shards: Whatever ``expand_shards`` takes.
        preprocess: The scorer's ``preprocess``. None for a loader that takes all scores from a table.
        image_transform: RGB image -> the training view of it. The image is the one that CLIP's view was made from, so
            it is decoded once, except that one which ``fast_decode`` reduced is decoded again in full. None gives
            CLIP's own view, uint8 ``[3, H, W]``.
        text_transform: Caption -> its training view; None gives the caption. Of an image with several,
            the list of them.
        columns: Extensions of other members that batches get as columns (``["json", "cls"]``): lists of text (``txt``),
            whole numbers (``cls``), what JSON holds, numpy arrays (``npy``, never of objects), or of any other
            extension bytes. None where a sample has no such member, or it is not what its extension says.
        sample_transform: Makes columns of a sample's members by extension, decoded like that, with ``__key__`` and
            ``__url__``: of those that ``columns`` names, or without ``columns`` of all. It gives a dict, which is
            collated as torch does, and runs in the workers on every sample that can be used, before it is known
            whether the sample is kept.
        shuffle: Shuffle the shards, and the samples within windows of this many; 0 keeps the order.
        seed: Of the order.
        layout: Which members are image and caption.
        allow_pipe: Read ``pipe:`` URLs, which run shell commands.
        skip_missing_shards: Leave out shards that are named and not there, such as those that a brace range spans, with
            a warning. Without it, they are an error.
        world: This rank among all; None lets the loader find out, and is a world of one where there is no loader.

    Raises:
        ValueError: When no shard matches, ``shuffle`` is no number of samples, a column can't have that name, or
            training would get views that the device is to make.
        TypeError: When ``preprocess`` is something else, such as the scorer.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        preprocess: ClipPreprocess | None = None,
        *,
        image_transform: ImageTransform | None = None,
        text_transform: TextTransform | None = None,
        columns: Sequence[str] | None = None,
        sample_transform: SampleTransform | None = None,
        shuffle: int = 0,
        seed: int = 0,
        layout: SampleLayout | None = None,
        allow_pipe: bool = False,
        skip_missing_shards: bool = False,
        world: World | None = None,
    ) -> None:
        shuffle, seed = plain(shuffle), plain(seed)
        if shuffle is True or not isinstance(shuffle, int) or shuffle < 0:
            raise ValueError(f"shuffle is {shuffle}; it is the number of samples that are shuffled together, or 0")
        if not (preprocess is None or isinstance(preprocess, ClipPreprocess)):
            raise TypeError(f"preprocess is of type {type(preprocess).__name__}; give a scorer's `preprocess`")
        if preprocess is not None and preprocess.view.resize_on_device and image_transform is None:
            raise ValueError(
                "without an image_transform training gets CLIP's views, and with resize_on_device workers make none; "
                "give an image_transform, or make the scorer without resize_on_device"
            )
        try:
            self.urls = expand_shards(shards, allow_pipe=allow_pipe, skip_missing=skip_missing_shards)
        except MissingShardError as error:
            raise ValueError(f"{error}; skip_missing_shards=True leaves out what is missing") from None
        self.preprocess = preprocess
        self.image_transform = image_transform
        self.text_transform = text_transform
        self.shuffle = shuffle
        self.seed = seed
        self.members = MemberColumns(columns=columns, transform=sample_transform)
        self.layout = replace(layout or SampleLayout(), others=self.members.to_read)
        self.allow_pipe = allow_pipe
        self.world = world
        self.epoch = 0

    def __repr__(self) -> str:
        others = f" and {len(self.urls) - 1} others" if len(self.urls) > 1 else ""
        return f"ClipWebDataset({public_url(self.urls[0])!r}{others}, shuffle={self.shuffle}, seed={self.seed})"

    def set_epoch(self, epoch: int) -> None:
        """Order shards and samples for this epoch from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[StreamBatch]:
        """One epoch, in batches of 64 samples (for use without a loader).

        Raises:
            ValueError: Without ``preprocess``.
        """
        info = get_worker_info()
        # Not looked up: this runs in workers, whose environment may name a world and no rank.
        world, num_workers = self.world or World(), info.num_workers if info else 1
        topology = self.topology(world, num_workers)
        streams = dict.fromkeys(topology.streams, StreamProgress(Position(epoch=self.epoch)))
        return iter(StreamWorker(self, topology, streams, batch_size=64, epoch=self.epoch))

    def topology(self, world: World, num_workers: int, num_streams: int | None = None) -> Topology:
        """Which streams this rank's workers read.

        Args:
            world: This rank among all.
            num_workers: Workers of each rank, at least 1.
            num_streams: Streams of an epoch; None is one for each worker of all ranks.

        Raises:
            ValueError: When there are fewer streams than ranks.
        """
        if num_streams is not None and num_streams < world.world_size:
            raise ValueError(f"num_streams is {num_streams}, which is too few for {world.world_size} ranks")
        return Topology(
            rank=world.rank,
            world_size=world.world_size,
            num_workers=num_workers,
            num_streams=num_streams or world.world_size * num_workers,
            num_groups=world.world_size,
        )


class StreamWorker(IterableDataset[StreamBatch]):
    """Runs a :class:`ClipWebDataset` in workers, which are told everything and look nothing up themselves.

    Args:
        dataset: What to read.
        topology: Which streams the workers of this rank read.
        streams: This rank's streams, and how far each is; in a later epoch where it has nothing left in this one.
        batch_size: Samples per batch, unusable ones included.
        epoch: The epoch to read.
        first: The worker whose batch comes first. DataLoader always begins with its worker 0, so that one is it.
        endless: Continue with the next epoch for ever.
        lookup: What is known of a shard before it is read. Samples known to be dropped are not read.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
        interleaved: See ``BatchSettings``.
        tracker: Workers report to it which sample they are at.

    Raises:
        ValueError: When there is neither ``view`` nor ``preprocess``.
    """

    def __init__(
        self,
        dataset: ClipWebDataset,
        topology: Topology,
        streams: Mapping[int, StreamProgress],
        *,
        batch_size: int,
        epoch: int,
        first: int = 0,
        endless: bool = False,
        lookup: ScoreLookup = no_scores,
        view: ImageView | None = None,
        interleaved: bool = False,
        tracker: CrashTracker | None = None,
    ) -> None:
        if view is None:
            if dataset.preprocess is None:
                raise ValueError("the dataset has no preprocess: give it the scorer's, or its loader a ScoreFolder")
            view = dataset.preprocess.view
        self.order = StreamOrder(
            urls=dataset.urls,
            shuffle=dataset.shuffle,
            seed=dataset.seed,
            num_streams=topology.num_streams,
            num_groups=topology.num_groups,
        )
        self.topology, self.streams = topology, streams
        self.epoch = epoch
        self.first = first
        self.endless = endless
        self.lookup = lookup
        self.settings = BatchSettings(
            batch_size=batch_size,
            layout=dataset.layout,
            view=view,
            preprocess=dataset.preprocess,
            image_transform=dataset.image_transform,
            text_transform=dataset.text_transform,
            members=dataset.members,
            interleaved=interleaved,
        )
        self.allow_pipe = dataset.allow_pipe
        self.tracker = tracker or CrashTracker(dataset.urls, topology.num_workers)

    def __iter__(self) -> Iterator[StreamBatch]:
        """This worker's batches. Iterated again, as persistent workers are, they are those of the next epoch."""
        info = get_worker_info()
        worker, streams = ((info.id if info else 0) + self.first) % self.topology.num_workers, self.streams
        self.epoch, self.first = self.epoch + 1, 0
        self.streams = dict.fromkeys(streams, StreamProgress(Position(epoch=self.epoch)))
        return self.read(worker, streams, None if self.endless else self.epoch - 1)

    def read(self, worker: int, streams: Mapping[int, StreamProgress], last_epoch: int | None) -> Iterator[StreamBatch]:
        """The batches of a worker, from there on and up to this epoch, None for without end."""
        worker_tracker = self.tracker.for_worker()
        builder = StreamBatchBuilder(worker, self.settings, worker_tracker)
        readers = [
            StreamReader(
                stream,
                streams[stream],
                partial(self._open_stream, worker_tracker, stream),
                builder,
                last_epoch=last_epoch,
                in_windows=self.order.shuffle > 0,
            )
            for stream in self.topology.streams_of(worker)
        ]
        return take_turns(readers)

    def _open_stream(
        self, worker_tracker: WorkerTracker, stream: int, start: Position
    ) -> Iterator[StreamSample | ShardFailure | PartEnd]:
        return read_stream(
            self.order,
            stream,
            start,
            self.settings.layout,
            worker_tracker,
            lookup=self.lookup,
            allow_pipe=self.allow_pipe,
        )
