"""What a sample costs the CPUs of the host when the model costs nothing: by thread, by process and by stage."""

import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.clocks import COPYING, DECODING, OTHER
from benchmarks.host_run import Job, Measured, Mode, Views, measure
from benchmarks.host_stages import BARE_DECODE, BARE_PILLOW, BARE_TORCHVISION
from benchmarks.material import make_model, make_shard
from benchmarks.options import Options
from benchmarks.report import Report

_IMAGE_SIZES, _BATCH_SIZES = (256, 512), (64, 256)
_QUICK_IMAGE_SIZES, _QUICK_BATCH_SIZES = (64,), (8,)

#: Samples per shard, and shards of a round.
_SHARD_SAMPLES: dict[Mode, int] = {"rewrite": 2048, "score": 2048, "inline": 1024, "from_scores": 2048}
_QUICK_SHARD_SAMPLES = 256
_NUM_SHARDS: dict[Mode, int] = {"rewrite": 1, "score": 1, "inline": 4, "from_scores": 8}

#: Shards before them that do not count: enough that all memory that is used again is in use.
_NUM_START_SHARDS: dict[Mode, int] = {"rewrite": 1, "score": 1, "inline": 8, "from_scores": 1}

#: Share that is kept wherever something is decided.
_KEPT = 0.3

#: Cores that the ceiling is computed for: one for the parent, and these for what decodes and copies.
_WORKER_CORES = 15


def host(options: Options, report: Report) -> None:
    """CPU microseconds per sample of all uses of the package, each in a process of its own."""
    records = []
    with tempfile.TemporaryDirectory(dir=_folder(options.cache)) as folder:
        for job in _jobs(options, Path(folder)):
            if not options.wants(job.name):
                continue
            record = _record(job, _in_fresh_process(job))
            records.append(record)
            report.tell(f"{job.name}: parent {record['parent_us']:.1f}, worker {record['worker_us']:.0f} us")
            report.keep("host", records)
    if not records:
        raise SystemExit(f"only is {options.only}, and no name of a measurement holds any of that")
    _print(records, report)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _jobs(options: Options, folder: Path) -> Iterator[Job]:
    image_sizes, batch_sizes = (
        (_QUICK_IMAGE_SIZES, _QUICK_BATCH_SIZES)
        if options.quick
        else (sorted({*_IMAGE_SIZES, options.image_size}), sorted({*_BATCH_SIZES, options.batch_size}))
    )
    model = make_model(options.cache, "tiny-224")
    for mode, views, kept, resize_on_device in _uses():
        shard_samples = _QUICK_SHARD_SAMPLES if options.quick else _SHARD_SAMPLES[mode]
        # Copying takes whole shards.
        for image_size, batch_size in product(image_sizes, batch_sizes[:1] if mode == "from_scores" else batch_sizes):
            yield Job(
                mode=mode,
                image_size=image_size,
                batch_size=batch_size,
                views=views,
                kept=kept,
                resize_on_device=resize_on_device,
                model=model,
                device=str(options.torch_device),
                num_workers=1 if options.num_workers is None else options.num_workers,
                shard=make_shard(options.cache, num_samples=shard_samples, image_size=image_size),
                num_start_shards=1 if options.quick else _NUM_START_SHARDS[mode],
                num_shards=_NUM_SHARDS[mode],
                num_samples=_NUM_SHARDS[mode] * shard_samples,
                rounds=options.turns(5),
                folder=folder,
            )


def _uses() -> Iterator[tuple[Mode, Views | None, float | None, bool]]:
    """Mode, views, share that is kept, and whether the device resizes."""
    for resize_on_device in (False, True):
        yield "rewrite", None, _KEPT, resize_on_device
        yield "score", None, None, resize_on_device
    for views, kept in product(("uint8", "float32"), (1.0, _KEPT)):
        yield "inline", views, kept, False
    yield "inline", "float32", _KEPT, True
    yield "from_scores", None, _KEPT, False


def _in_fresh_process(job: Job) -> Measured:
    """What :func:`measure` returns in a new process, forked off one that has imported all and run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.host_run", "transformers.models.clip.modeling_clip"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send_measured, args=(there, job))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f"the process that was to measure {job.name} has failed; its error stands above") from None
    finally:
        process.join()


def _send_measured(pipe: Any, job: Job) -> None:
    pipe.send(measure(job))


def _record(job: Job, measured: Measured) -> dict[str, Any]:
    """Medians over the rounds, in microseconds per sample."""

    def per_sample(seconds: Sequence[float]) -> list[float]:
        return [1e6 * value / job.num_samples for value in seconds]

    rounds = measured.rounds
    names = {name for times in rounds for name in times.threads}
    threads = {name: median(per_sample([times.threads.get(name, 0.0) for times in rounds])) for name in sorted(names)}
    children = {role: per_sample([times.children[role] for times in rounds]) for role in (DECODING, COPYING, OTHER)}
    parents = per_sample([sum(times.threads.values()) + times.children[OTHER] for times in rounds])
    stages = {name: median(times[name] for times in measured.stages) for name in measured.stages[0]}
    bare = {name: stages.pop(name) for name in (BARE_DECODE, BARE_PILLOW, BARE_TORCHVISION)}
    parent, worker, copying = (median(values) for values in (parents, children[DECODING], children[COPYING]))
    stages = {**stages, "rest": worker - sum(stages.values())} if worker else {}
    return {
        "name": job.name,
        "mode": job.mode,
        "image_size": job.image_size,
        "batch_size": job.batch_size,
        "views": job.views,
        "kept": job.kept,
        "resize_on_device": job.resize_on_device,
        "parent_us": parent,
        **({"training_thread_us": threads["main"]} if job.mode == "inline" else {}),
        "worker_us": worker,
        "copying_us": copying,
        "bare_us": bare[BARE_DECODE] + bare[BARE_PILLOW],
        "bare_torchvision_us": bare[BARE_DECODE] + bare[BARE_TORCHVISION],
        "samples_per_second_16_cores": 1e6 / max(parent, (worker + copying) / _WORKER_CORES),
        "threads": threads,
        "stages": stages,
        "bare": bare,
        "rounds": {"parent_us": parents, "worker_us": children[DECODING], "copying_us": children[COPYING]},
        "num_samples": job.num_samples,
        "image_bytes": round(job.shard.stat().st_size / (job.num_samples / job.num_shards)),
    }


#: Threads with a column of their own.
_THREADS = ("main", "scorer", "writer", "pin", "native")


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a record."""
    kept = "" if record["kept"] is None else f" {record['kept']:.0%}"
    views = "" if record["views"] is None else f" {record['views']}"
    threads = {name: record["threads"].get(name) for name in _THREADS}
    threads["others"] = record["parent_us"] - sum(value or 0.0 for value in threads.values())
    row = {
        "use": f"{record['mode']}{views}{kept}{' on device' if record['resize_on_device'] else ''}",
        "image_size": record["image_size"],
        "batch_size": record["batch_size"],
        "parent": f"{record['parent_us']:,.1f}",
        **{name: f"{value:,.1f}" for name, value in threads.items() if value is not None},
        "copying": f"{record['copying_us']:,.0f}" if record["copying_us"] else None,
        "ceiling": f"{record['samples_per_second_16_cores']:,.0f}",
    }
    if not record["stages"]:
        return row
    return row | {
        "worker": f"{record['worker_us']:,.0f}",
        "bare": f"{record['bare_torchvision_us']:,.0f}",
        "to bare": f"{record['worker_us'] / record['bare_torchvision_us']:.2f}",
        "to Pillow": f"{record['worker_us'] / record['bare_us']:.2f}",
        **{name: f"{value:,.0f}" for name, value in record["stages"].items()},
    }


def _print(records: Sequence[dict[str, Any]], report: Report) -> None:
    rows = [_row(record) for record in records]
    first = {"": "use", "px": "image_size", "batch": "batch_size"}
    threads = {name: name for name in (*_THREADS, "others") if any(name in row for row in rows)}
    report.table(
        "CPU time per sample in microseconds when the model costs nothing: the parent and its threads",
        {**first, "parent": "parent", **threads, "copying": "copying", f"1+{_WORKER_CORES} cores/s": "ceiling"},
        rows,
    )
    stages = {name: name for record in records for name in record["stages"] if name != "rest"} | {"rest": "rest"}
    report.table(
        "The same of a worker, and its stages",
        {**first, "worker": "worker", "bare": "bare", "/ bare": "to bare", "/ PIL": "to Pillow", **stages},
        [row for row in rows if "worker" in row],
    )
    for line in _NOTES:
        report.tell(line)


_NOTES = (
    "parent: user and system time of all processes but those that decode or copy, ended threads included, by the",
    "kernel's clocks. worker, copying: that of the processes which decode, and of those which copy what is kept.",
    "A round is the difference of two whole runs, with and without the counted samples. Medians of the rounds.",
    "Stages run one after another, a batch at a time, in a process that is set up as a worker is; what they leave of",
    "the worker's time is rest: sending, and what lies between the stages.",
    "on device: workers do not resize; of the parent, a CPU starts the operations that resize on next to no pixels.",
    "bare: simplejpeg and torchvision's bicubic resize and crop of the same images; PIL: with Pillow's resize.",
    f"1+{_WORKER_CORES} cores/s: what one core for the parent and {_WORKER_CORES} for the others allow.",
)
