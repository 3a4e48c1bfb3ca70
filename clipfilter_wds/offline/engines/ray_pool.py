"""Runs tasks on Ray, in actors that keep what they have loaded and are replaced when they die."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from clipfilter_wds.offline.engines.ray_cluster import connect, import_ray, shut_down

#: What an actor does: a picklable function of what it has loaded.
Task = Callable[[Any], Any]

#: Ray hands on a Ctrl-C when it is done waiting.
_WAIT_SECONDS = 0.25
#: Actors in a row that die while they start.
_MAX_FAILED_STARTS = 10
#: What stands for the result of a task that is to be tried again.
_AGAIN = object()


@dataclass(frozen=True, kw_only=True)
class TaskFailure:
    """A task that is given up: the error of its last attempt, and how many there were."""

    error: BaseException
    attempts: int

    def __str__(self) -> str:
        first_line = next(iter(str(self.error).strip().splitlines()), "")
        return f"given up after {self.attempts} attempts, the last ended with {type(self.error).__name__}: {first_line}"


class RayPool:
    """As many actors as the cluster has room for; one per GPU, or per ``cpus_per_task`` CPUs without GPUs.

    Used in a ``with`` block, at whose end the actors are gone, and Ray too if it was started here.

    Args:
        load: Makes, in each actor, what tasks are called with. Picklable.
        address: Of a running Ray cluster; None starts Ray on this machine (or takes the cluster of ``RAY_ADDRESS``).
        cpus_per_task: CPUs of an actor; None shares them out among the GPUs, and is 1 without GPUs.
        use_gpus: Give each actor a GPU, if the cluster has any.
        max_attempts: How often a task is tried. A node that is taken away on purpose costs no attempt.
        final: Errors that trying again would not mend.

    Raises:
        ValueError: When Ray is not installed or not to be reached, has no room for an actor, or ``load`` fails.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        address: str | None = None,
        cpus_per_task: int | None = None,
        use_gpus: bool = True,
        max_attempts: int = 3,
        final: tuple[type[BaseException], ...] = (),
    ) -> None:
        if cpus_per_task is not None and cpus_per_task < 1:
            raise ValueError(f"cpus_per_task is {cpus_per_task}; it must be at least 1")
        self._ray = import_ray()
        self._owns_ray = connect(self._ray, address)
        self._load, self._max_attempts, self._final = load, max_attempts, final
        self._cpus_per_task, self._use_gpus = cpus_per_task, use_gpus
        self._folder = os.getcwd()  # noqa: PTH109  # handed to other processes
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, str]] = {}
        self._num_failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.release()
        if self._owns_ray:
            shut_down(self._ray)

    def release(self) -> None:
        """End all actors, so that others have room. They are hired again when there is a task."""
        for actor in [*self._starting.values(), *self._idle, *(actor for actor, _ in self._running.values())]:
            self._dismiss(actor)
        self._starting, self._idle, self._running = {}, [], {}

    def map(self, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Any]]:
        """Do tasks, in any order; each task's name, with its result or a :class:`TaskFailure`, when it is done."""
        waiting, attempts = deque(tasks), Counter[str]()
        while waiting or self._running:
            self._hire(len(waiting))
            while waiting and self._idle:
                actor, name = self._idle.pop(), waiting.popleft()
                self._running[actor.do.remote(tasks[name])] = actor, name
            done, _ = self._ray.wait([*self._running, *self._starting], num_returns=1, timeout=_WAIT_SECONDS)
            for ref in done:
                if ref in self._starting:
                    self._finish_start(ref)
                    continue
                name, result = self._finish_task(ref, attempts)
                if result is _AGAIN:
                    waiting.append(name)
                else:
                    yield name, result

    def _finish_task(self, ref: Any, attempts: Counter[str]) -> tuple[str, Any]:
        actor, name = self._running.pop(ref)
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._dismiss(actor)
            if not getattr(error, "preempted", False):
                attempts[name] += 1
            failure: BaseException = RuntimeError("the process that did it died")
        except Exception as error:  # noqa: BLE001  # the task's own; what becomes of it is the caller's to say
            self._idle.append(actor)
            failure = getattr(error, "cause", None) or error
            attempts[name] += 1
            if isinstance(failure, self._final):
                return name, TaskFailure(error=failure, attempts=attempts[name])
        else:
            self._idle.append(actor)
            return name, result
        if attempts[name] < self._max_attempts:
            return name, _AGAIN
        return name, TaskFailure(error=failure, attempts=attempts[name])

    def _hire(self, num_waiting: int) -> None:
        """Start actors until there is one for every waiting task, as far as the cluster has room."""
        resources, room = self._room()
        if room == 0 and not (self._starting or self._running):
            raise ValueError(f"no node of the Ray cluster has {resources['num_cpus']} CPUs; see cpus_per_task")
        num_hired = len(self._starting) + len(self._idle) + len(self._running)
        num_free = len(self._starting) + len(self._idle)
        for _ in range(min(room - num_hired, num_waiting - num_free)):
            actor = _actor_class(self._ray).options(**resources).remote(self._folder, self._load)
            self._starting[actor.ready.remote()] = actor

    def _room(self) -> tuple[dict[str, Any], int]:
        """What an actor takes, and how many the cluster has room for now; it may grow and shrink."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        num_cpus = sum(node.get("CPU", 0) for node in nodes)
        num_gpus = sum(node.get("GPU", 0) for node in nodes) if self._use_gpus else 0
        if num_gpus >= 1:
            each = self._cpus_per_task or max(1, int(num_cpus // num_gpus))
            room = sum(int(min(node.get("GPU", 0), node.get("CPU", 0) // each)) for node in nodes)
            return {"num_cpus": each, "num_gpus": 1, "scheduling_strategy": "SPREAD"}, room
        each = self._cpus_per_task or 1
        return {"num_cpus": each, "scheduling_strategy": "SPREAD"}, sum(
            int(node.get("CPU", 0) // each) for node in nodes
        )

    def _finish_start(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._dismiss(actor)
            self._num_failed_starts += 1
            if error.actor_init_failed or self._num_failed_starts > _MAX_FAILED_STARTS:
                raise ValueError(f"an actor can't start: {_last_line(error)}") from error
        else:
            self._num_failed_starts = 0
            self._idle.append(actor)

    def _dismiss(self, actor: Any) -> None:
        with suppress(Exception):  # it may be dead, and so may be Ray
            self._ray.kill(actor)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def _actor_class(ray: Any) -> Any:
    @ray.remote
    class Worker:
        def __init__(self, folder: str, load: Callable[[], Any]) -> None:
            with suppress(OSError):  # relative paths are meant as in the driver, where there is such a folder
                os.chdir(folder)
            self._loaded = load()

        def ready(self) -> None:
            pass

        def do(self, task: Task) -> Any:
            return task(self._loaded)

    return Worker
